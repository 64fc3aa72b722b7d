#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace mixhead {

/// An operator's handle, for calls through the dispatcher. Throws c10::Error where no operator has
/// this name or its signature is another.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace mixhead
