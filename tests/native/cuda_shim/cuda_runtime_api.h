// As cuda_runtime.h: the host's part of it.
#pragma once
#include "cuda_runtime.h"
