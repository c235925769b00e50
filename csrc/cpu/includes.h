// Everything that the per-ISA code includes, before any target pragma.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "api.h"
#include "filter_cache.h"
#include "memory.h"
#include "turns.h"
