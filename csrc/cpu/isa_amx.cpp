// symmetric_rank_k_update for bf16 rows on AMX tiles; setup.py gives this file, and no other, its flags.
//
// A product needs the left operand by columns of x (16 columns, 32 rows of x) and the right one with pairs of rows
// interleaved. Both come from the same 16 x 16 block of 32-bit pairs (x[2r, c], x[2r + 1, c]): as it is it is a right
// tile, transposed it is a left one. Tiles are packed once per panel of 32 columns and then only loaded. A packed chunk
// is ordered by turns of DEPTH_STEPS steps, in a turn by panels, in a panel by steps: what a macro block reads in a
// turn lies in one piece. Products of two bf16 are exact in fp32 and sums are kept in fp32; the unit treats subnormal
// numbers as zero.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernel_table.h"

#define KF_VECTOR_BYTES 64

namespace kf::cpu {
namespace {

#include "vector_math.inl"
#include "lower_tile.inl"

constexpr int PANEL = 32;        // columns of a panel: two tiles
constexpr int STEP = 32;         // rows of x in one tile
constexpr int64_t TILE = 1024;   // bytes
constexpr int DEPTH_STEPS = 16;  // steps whose right panel stays in the first-level cache
constexpr int SIDE = 256;        // columns of a macro block, its sums a matrix in the second-level cache
constexpr int64_t PREFETCH_COLUMNS = 4 * PANEL;
constexpr int PREFETCH_STEPS = 4;
constexpr int PARTS = 3;  // bf16 terms that hold a weighted fp32 operand to its last bit

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void enter() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  // The intrinsic tells GCC of 8 bytes only; without this the stores above would be dropped as dead.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

void leave() { _tile_release(); }

int64_t steps_of(int64_t depth) { return (depth + STEP - 1) / STEP; }

size_t left_bytes(int64_t depth, bool weighted) { return size_t(steps_of(depth)) * 2 * TILE * (weighted ? PARTS : 1); }
size_t right_bytes(int64_t depth) { return size_t(steps_of(depth)) * 2 * TILE; }

// 32 columns of row `row` as bf16 bits, zeros past the matrix, the mask and the chunk.
inline __m512i load_row(const SymmetricSource& s, int64_t row, int64_t end, int64_t c0) {
  if (row >= end || (s.mask && !s.mask[row])) return _mm512_setzero_si512();
  const uint16_t* x = static_cast<const uint16_t*>(s.x) + row * s.row_stride + c0 * s.column_stride;
  const int64_t columns = s.d - c0;
  if (s.column_stride == 1) {
    if (columns >= PANEL) return _mm512_loadu_si512(x);
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t(1) << columns) - 1), x);
  }
  alignas(64) uint16_t lane[PANEL] = {};
  for (int64_t c = 0; c < columns && c < PANEL; ++c) lane[c] = x[c * s.column_stride];
  return _mm512_load_si512(lane);
}

// Bits of 16 bf16 as 32-bit lanes: the first or second half of a row.
inline __m512i half_of(__m512i row, int half) {
  return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(row, 1) : _mm512_castsi512_si256(row));
}

inline __m512i interleave(__m512i even, __m512i odd) { return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)); }

// out[c][r] = in[r][c] for 16 x 16 32-bit lanes.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline void store_tile(char* to, const __m512i tile[16]) {
  for (int r = 0; r < 16; ++r) _mm512_store_si512(to + r * 64, tile[r]);
}

// The bf16 part of `v` (bits in 32-bit lanes), and v less that part.
inline __m512i take_bf16(__m512& v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  // What is not finite, or would be once rounded up, is cut instead, NaN kept quiet.
  const __m512i exponent = _mm512_set1_epi32(0x7f80), high = _mm512_srli_epi32(u, 16);
  const __mmask16 cut = _mm512_cmpeq_epi32_mask(_mm512_and_si512(bits, exponent), exponent) |
                        _mm512_cmpeq_epi32_mask(_mm512_and_si512(high, exponent), exponent);
  bits = _mm512_mask_mov_epi32(bits, cut, high);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x40));
  v = _mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
  return bits;
}

// The left tiles of one half panel: weight times x, in PARTS bf16 terms that add up to the fp32 product.
void pack_weighted(const SymmetricSource& s, int64_t row, int64_t end, int64_t c0, int half, int64_t part_bytes,
                   char* to) {
  __m512i tile[PARTS][16];
  for (int r = 0; r < 16; ++r) {
    __m512i part[2][PARTS];
    for (int odd = 0; odd < 2; ++odd) {
      const int64_t at = row + 2 * r + odd;
      const float w = at < end ? static_cast<float>(s.weight[at]) : 0.0f;
      const __m512i bits = half_of(load_row(s, at, end, c0), half);
      __m512 v = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_set1_ps(w));
      for (int p = 0; p < PARTS; ++p) part[odd][p] = take_bf16(v);
    }
    for (int p = 0; p < PARTS; ++p) tile[p][r] = interleave(part[0][p], part[1][p]);
  }
  for (int p = 0; p < PARTS; ++p) {
    transpose(tile[p]);
    store_tile(to + p * part_bytes, tile[p]);
  }
}

// Asks for a coming part of 32 rows: so many streams are more than the hardware prefetcher follows.
inline void prefetch_rows(const SymmetricSource& s, int64_t row, int64_t end, int64_t column) {
  if (column >= s.d || s.column_stride != 1) return;
  const uint16_t* x = static_cast<const uint16_t*>(s.x) + column;
  for (int64_t r = row; r < row + STEP && r < end; ++r) {
    _mm_prefetch(reinterpret_cast<const char*>(x + r * s.row_stride), _MM_HINT_T0);
  }
}

// Where the tiles of a panel begin in one turn of a packed chunk, and where the turn's other panels and parts are.
struct Turn {
  int64_t first, steps;  // of the chunk's steps
  int64_t base;          // bytes before the turn
  int64_t panel_bytes, part_bytes;

  Turn(int64_t depth, int64_t step, int64_t d, int parts) {
    const int64_t panels = (d + PANEL - 1) / PANEL;
    first = step / DEPTH_STEPS * DEPTH_STEPS;
    steps = steps_of(depth) - first < DEPTH_STEPS ? steps_of(depth) - first : DEPTH_STEPS;
    base = first * 2 * TILE * panels * parts;
    panel_bytes = steps * 2 * TILE;
    part_bytes = panels * panel_bytes;
  }
  int64_t panel(int64_t column, int64_t part) const { return base + part * part_bytes + column / PANEL * panel_bytes; }
};

void pack(const SymmetricSource& s, int64_t k0, int64_t depth, int64_t k, int64_t rows, void* left, void* right) {
  const int64_t end = k0 + depth;
  for (int64_t at = k; at < k + rows; at += STEP) {
    const int64_t row = k0 + at;
    const Turn to_right(depth, at / STEP, s.d, 1), to_left(depth, at / STEP, s.d, s.weight ? PARTS : 1);
    const int64_t offset = (at / STEP - to_right.first) * 2 * TILE;
    for (int64_t c0 = 0; c0 < s.d; c0 += PANEL) {
      char* l = static_cast<char*>(left) + to_left.panel(c0, 0) + offset;
      char* r = static_cast<char*>(right) + to_right.panel(c0, 0) + offset;
      __m512i tile[2][16];
      prefetch_rows(s, row, end, c0 + PREFETCH_COLUMNS);
      for (int i = 0; i < 16; ++i) {
        const __m512i even = load_row(s, row + 2 * i, end, c0), odd = load_row(s, row + 2 * i + 1, end, c0);
        tile[0][i] = interleave(half_of(even, 0), half_of(odd, 0));
        tile[1][i] = interleave(half_of(even, 1), half_of(odd, 1));
      }
      for (int half = 0; half < 2; ++half) {
        store_tile(r + half * TILE, tile[half]);
        if (s.weight) {
          pack_weighted(s, row, end, c0, half, to_left.part_bytes, l + half * TILE);
        } else {
          transpose(tile[half]);
          store_tile(l + half * TILE, tile[half]);
        }
      }
    }
  }
}

// The sums of a panel pair: 32 x 32, row-major, contiguous.
void load_sums(const float* sums) {
  _tile_loadd(0, sums, PANEL * 4);
  _tile_loadd(1, sums + 16, PANEL * 4);
  _tile_loadd(2, sums + 16 * PANEL, PANEL * 4);
  _tile_loadd(3, sums + 16 * PANEL + 16, PANEL * 4);
}

void store_sums(float* sums) {
  _tile_stored(0, sums, PANEL * 4);
  _tile_stored(1, sums + 16, PANEL * 4);
  _tile_stored(2, sums + 16 * PANEL, PANEL * 4);
  _tile_stored(3, sums + 16 * PANEL + 16, PANEL * 4);
}

void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Asks for lines [begin, end) of the left tiles that come PREFETCH_STEPS later: they stream from the second-level
// cache.
template <int BEGIN, int END>
inline void prefetch_left(const char* a) {
#pragma GCC unroll 16
  for (int line = BEGIN; line < END; ++line) _mm_prefetch(a + PREFETCH_STEPS * 2 * TILE + line * 64, _MM_HINT_T0);
}

inline void multiply_step(const char* a, const char* b) {
  _tile_loadd(4, a, 64);
  _tile_loadd(6, b, 64);
  prefetch_left<0, 8>(a);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + TILE, 64);
  prefetch_left<8, 20>(a);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, a + TILE, 64);
  prefetch_left<20, 32>(a);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

void block(const PackedChunk& chunk, const BlockRange& range, double alpha, const Accumulator& acc, void* scratch) {
  const auto [i0, i1, j0, j1] = range;
  const int64_t depth = chunk.depth, d = chunk.d;
  const int64_t steps = steps_of(depth), parts = chunk.weighted ? PARTS : 1;
  for (int64_t k0 = 0; k0 < steps; k0 += DEPTH_STEPS) {
    const Turn of_left(depth, k0, d, parts), of_right(depth, k0, d, 1);
    for (int64_t part = 0; part < parts; ++part) {
      const bool first = k0 == 0 && part == 0, last = k0 + DEPTH_STEPS >= steps && part == parts - 1;
      for (int64_t j = j0; j < j1; j += PANEL) {
        const char* b = static_cast<const char*>(chunk.right) + of_right.panel(j, 0);
        for (int64_t i = i0 > j ? i0 : j; i < i1; i += PANEL) {
          const char* a = static_cast<const char*>(chunk.left) + of_left.panel(i, part);
          float* sums = static_cast<float*>(scratch) + (i - i0) * SIDE + (j - j0) * PANEL;
          const int64_t rows = i1 - i < PANEL ? i1 - i : PANEL, columns = j1 - j < PANEL ? j1 - j : PANEL;
          if (last) prefetch_tile(rows, columns, i, j, acc);
          if (first) {
            zero_sums();
          } else {
            load_sums(sums);
          }
          for (int64_t k = 0; k < of_left.steps; ++k) multiply_step(a + k * 2 * TILE, b + k * 2 * TILE);
          store_sums(sums);
          if (last) add_lower_tile(sums, PANEL, rows, columns, i, j, alpha, acc);
        }
      }
    }
  }
}

}  // namespace

const KernelTable& amx_table() {
  static const KernelTable table = [] {
    KernelTable t = avx512_table();
    t.symmetric_bf16 = {PANEL, PANEL, SIDE, SIDE * SIDE * 4, left_bytes, right_bytes, pack, block, enter, leave};
    return t;
  }();
  return table;
}

}  // namespace kf::cpu
