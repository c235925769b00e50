// Everything that the per-ISA code includes, before any target pragma.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "api.h"
#include "filter_cache.h"
#include "memory.h"
