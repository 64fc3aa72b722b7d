#pragma once

/// The layers of mixhead as torch::nn modules.
#include "nn/mixed_multihead_attention.h"
#include "nn/state_dict.h"
