#pragma once

/// The C++ API of mixhead, one include: the ops as functions with an options struct, and the
/// layers. Where only an op is used, its own header (<mixhead/mixed_attention/op.h>) compiles much
/// faster.
#include "kernel_attention/op.h"
#include "local_linear_attention/op.h"
#include "matching_attention/op.h"
#include "merge_attention/op.h"
#include "mixed_attention/op.h"
#include "nn.h"
#include "topk_keys/op.h"
