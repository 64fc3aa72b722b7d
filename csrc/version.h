#pragma once

namespace mixhead {

/// The version of this library, "major.minor.patch".
const char* version();

/// The version of LibTorch this library was built with. A library runs with that minor version
/// alone: loaded beside another, it ends the process with a message that names both.
const char* torch_version();

}  // namespace mixhead
