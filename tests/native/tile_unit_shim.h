// The tile unit (AMX) in software, for processors without one: its intrinsics after what Intel's manual says of the
// instructions. Included in front of csrc/cpu/isa_amx.cpp by tests/test_sanitizers.py.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tile_unit_shim {

struct Tile {
  uint32_t rows[16][16];
};

// A thread's tiles. Not configured: what a test would not survive on the unit itself.
struct State {
  bool configured = false;
  Tile tiles[8];

  static State& get() {
    static thread_local State state;
    return state;
  }
  Tile& at(int index) {
    if (!configured) __builtin_trap();
    return tiles[index];
  }
};

inline float number(uint32_t half) {
  const uint32_t bits = half << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void configure(const void* configuration) {
  const uint8_t* const bytes = static_cast<const uint8_t*>(configuration);
  if (bytes[0] != 1) __builtin_trap();
  for (int i = 0; i < 8; ++i)
    if (bytes[16 + 2 * i] != 64 || bytes[17 + 2 * i] != 0 || bytes[48 + i] != 16) __builtin_trap();
  State::get().configured = true;
  std::memset(State::get().tiles, 0, sizeof(State::get().tiles));
}
inline void release() { State::get().configured = false; }
inline void zero(int to) { State::get().at(to) = Tile{}; }
inline void load(int to, const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(State::get().at(to).rows[row], static_cast<const char*>(from) + row * stride, 64);
}
inline void store(int from, void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, State::get().at(from).rows[row], 64);
}
// sum[row][column] += both products of each of 16 pairs.
inline void dot_pairs(int sum, int left, int right) {
  const Tile &a = State::get().at(left), &b = State::get().at(right);
  for (int row = 0; row < 16; ++row)
    for (int pair = 0; pair < 16; ++pair)
      for (int column = 0; column < 16; ++column) {
        const uint32_t x = a.rows[row][pair], y = b.rows[pair][column];
        float total;
        std::memcpy(&total, &State::get().at(sum).rows[row][column], sizeof(total));
        total += number(x & 0xffff) * number(y & 0xffff);
        total += number(x >> 16) * number(y >> 16);
        std::memcpy(&State::get().at(sum).rows[row][column], &total, sizeof(total));
      }
}

}  // namespace tile_unit_shim

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(configuration) tile_unit_shim::configure(configuration)
#define _tile_release() tile_unit_shim::release()
#define _tile_zero(tile) tile_unit_shim::zero(tile)
#define _tile_loadd(tile, from, stride) tile_unit_shim::load(tile, from, stride)
#define _tile_stored(tile, to, stride) tile_unit_shim::store(tile, to, stride)
#define _tile_dpbf16ps(sum, left, right) tile_unit_shim::dot_pairs(sum, left, right)
