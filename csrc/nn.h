#pragma once

/// The layers of mixhead as torch::nn modules.
#include "nn/kernel_multihead_attention.h"
#include "nn/mixed_multihead_attention.h"
#include "nn/state_dict.h"
