#pragma once

/// The C++ API of mixhead, one include: the ops as functions with an options struct.
#include "merge_attention/op.h"
#include "mixed_attention/op.h"
