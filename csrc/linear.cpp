#include "linear.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "avx512.h"
#include "gemm.h"
#include "parallel.h"

namespace pmc {

#ifdef PMC_X86
namespace {

// Up to kFewRows, rows of weight are multiplied as they lie (up to about 12 rows of x memory is the limit).
// Above, a panel of weight is turned on its side first, which pays when enough rows of x use it; above
// kManyRows, x no longer stays in cache and has to be cut as well.
constexpr int64_t kFewRows = 96;
constexpr int64_t kManyRows = 256;
constexpr int64_t kFewTile = 6;  // rows of x at once: 6 x 4 sums fill the registers
constexpr int64_t kTile = 12;    // rows of x of one tile of y: 12 x 2 sums fill the registers
constexpr int64_t kPanel = 32;   // columns of y of one panel of weight
// of `in` at once: bounds the rounding of long sums, and keeps a panel in cache
constexpr int64_t kDepth = 512;

// y[MR, NR] of rows of x and rows of weight, each a dot product.
template <int MR, int NR>
PMC_AVX512 inline void dot_tile(const Linear& a, int64_t m, int64_t n, int64_t ahead) {
  __m512 sum[MR][NR];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  const float* x = a.x + m * a.in;
  const float* w = a.weight + n * a.in;
  int64_t k = 0;
  for (; k + 16 <= a.in; k += 16) {
    __m512 row[NR];
    for (int j = 0; j < NR; ++j) {
      row[j] = _mm512_loadu_ps(w + j * a.in + k);
      _mm_prefetch(reinterpret_cast<const char*>(w + j * a.in + k + ahead), _MM_HINT_T1);
    }
    for (int i = 0; i < MR; ++i) {
      const __m512 v = _mm512_loadu_ps(x + i * a.in + k);
      for (int j = 0; j < NR; ++j) sum[i][j] = _mm512_fmadd_ps(v, row[j], sum[i][j]);
    }
  }
  if (k < a.in) {
    const __mmask16 mask = tail_mask(a.in - k);
    for (int i = 0; i < MR; ++i) {
      const __m512 v = _mm512_maskz_loadu_ps(mask, x + i * a.in + k);
      for (int j = 0; j < NR; ++j) {
        sum[i][j] = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(mask, w + j * a.in + k), sum[i][j]);
      }
    }
  }
  constexpr int kSums = (MR * NR + 15) / 16 * 16;
  float total[kSums];
  __m512 all[kSums] = {};
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) all[i * NR + j] = sum[i][j];
  }
  for (int i = 0; i < kSums; i += 16) _mm512_storeu_ps(total + i, sum_lanes(all + i));
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j)
      a.y[(m + i) * a.out + n + j] = total[i * NR + j] + (a.bias ? a.bias[n + j] : 0.0f);
  }
}

template <int MR, int NR>
PMC_AVX512 void dot_columns(const Linear& a, int64_t m, int64_t begin, int64_t end, int64_t ahead) {
  int64_t n = begin;
  for (; n + NR <= end; n += NR) dot_tile<MR, NR>(a, m, n, ahead);
  for (; n < end; ++n) dot_tile<MR, 1>(a, m, n, ahead);
}

PMC_AVX512 void few_rows(const Linear& a, int64_t begin, int64_t end) {
  // a stripe of weight stays in the first-level cache while all tiles of x use it
  const int64_t tiles = (a.rows + kFewTile - 1) / kFewTile;
  const int64_t stripe = tiles == 1 ? end - begin : 12;
  const int64_t ahead = (tiles == 1 ? 32 : stripe) * a.in;
  for (int64_t n = begin; n < end; n += stripe) {
    const int64_t stop = std::min(end, n + stripe);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = a.rows * t / tiles, size = a.rows * (t + 1) / tiles - m;
      switch (size) {
        case 1:
          dot_columns<1, 8>(a, m, n, stop, ahead);
          break;
        case 2:
          dot_columns<2, 8>(a, m, n, stop, ahead);
          break;
        case 3:
          dot_columns<3, 6>(a, m, n, stop, ahead);
          break;
        case 4:
          dot_columns<4, 6>(a, m, n, stop, ahead);
          break;
        case 5:
          dot_columns<5, 4>(a, m, n, stop, ahead);
          break;
        default:
          dot_columns<6, 4>(a, m, n, stop, ahead);
      }
    }
  }
}

// y[MR, columns] += x[MR, depth] @ panel; the first block of `in` starts from the bias.
template <int MR>
PMC_AVX512 void outer_tile(const Linear& a, int64_t m, int64_t n, int64_t columns, int64_t k0, int64_t depth,
                           const float* panel, const float* next) {
  const __mmask16 low = tail_mask(columns), high = columns > 16 ? tail_mask(columns - 16) : 0;
  __m512 sum[MR][2];
  for (int i = 0; i < MR; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  const float* x = a.x + m * a.in + k0;
  const int64_t stride = a.in;
  for (int64_t k = 0; k < depth; ++k) {
    if (k % 16 == 0) _mm_prefetch(reinterpret_cast<const char*>(next + k), _MM_HINT_T1);
    const __m512 w0 = _mm512_load_ps(panel + k * kPanel), w1 = _mm512_load_ps(panel + k * kPanel + 16);
    for (int i = 0; i < MR; ++i) {
      const __m512 v = _mm512_set1_ps(x[i * stride + k]);
      sum[i][0] = _mm512_fmadd_ps(v, w0, sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(v, w1, sum[i][1]);
    }
  }
  for (int i = 0; i < MR; ++i) {
    float* y = a.y + (m + i) * a.out + n;
    __m512 y0 = _mm512_setzero_ps(), y1 = y0;
    if (k0 > 0) {
      y0 = _mm512_maskz_loadu_ps(low, y), y1 = _mm512_maskz_loadu_ps(high, y + 16);
    } else if (a.bias) {
      y0 = _mm512_maskz_loadu_ps(low, a.bias + n), y1 = _mm512_maskz_loadu_ps(high, a.bias + n + 16);
    }
    _mm512_mask_storeu_ps(y, low, _mm512_add_ps(y0, sum[i][0]));
    _mm512_mask_storeu_ps(y + 16, high, _mm512_add_ps(y1, sum[i][1]));
  }
}

using TileFn = void (*)(const Linear&, int64_t, int64_t, int64_t, int64_t, int64_t, const float*,
                        const float*);
constexpr TileFn kTiles[kTile] = {outer_tile<1>, outer_tile<2>,  outer_tile<3>,  outer_tile<4>,
                                  outer_tile<5>, outer_tile<6>,  outer_tile<7>,  outer_tile<8>,
                                  outer_tile<9>, outer_tile<10>, outer_tile<11>, outer_tile<12>};

void many_rows(const Linear& a, int64_t begin, int64_t end) {
  const int64_t block = std::min(a.in, kDepth);
  std::vector<float> memory(static_cast<size_t>((block + 15) / 16 * 16 * kPanel + 16));
  float* panel = memory.data();
  panel += (64 - reinterpret_cast<uintptr_t>(panel) % 64) % 64 / sizeof(float);
  const int64_t tiles = (a.rows + kTile - 1) / kTile;
  for (int64_t n = begin * kPanel; n < std::min(end * kPanel, a.out); n += kPanel) {
    const int64_t columns = std::min(kPanel, a.out - n);
    for (int64_t k0 = 0; k0 < a.in; k0 += block) {
      const int64_t depth = std::min(block, a.in - k0);
      // columns past the end repeat the last: their sums are never stored
      for (int64_t half = 0; half < columns; half += 16) {
        turn16(a.weight + (n + half) * a.in + k0, a.in, columns - half, depth, panel + half, kPanel);
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t m = a.rows * t / tiles, size = a.rows * (t + 1) / tiles - m;
        // each tile of x fetches some rows of the weight's next panel
        const float* next = a.weight + std::min(a.out - 1, n + kPanel + t * kPanel / tiles) * a.in + k0;
        kTiles[size - 1](a, m, n, columns, k0, depth, panel, next);
      }
    }
  }
}

}  // namespace

void linear(const Linear& a, int threads) {
  if (a.rows <= kFewRows || a.in == 0) {  // of nothing the bias alone is left
    parallel_for(a.out, threads, [&](int64_t begin, int64_t end) { few_rows(a, begin, end); });
  } else if (a.rows > kManyRows) {
    gemm({a.x, a.weight, a.bias, a.y, a.rows, a.out, a.in, a.in, a.in, a.out, false, true, false}, threads);
  } else {
    const int64_t panels = (a.out + kPanel - 1) / kPanel;
    parallel_for(panels, threads, [&](int64_t begin, int64_t end) { many_rows(a, begin, end); });
  }
}
#else
void linear(const Linear&, int) { throw std::logic_error("linear needs AVX-512"); }
#endif

}  // namespace pmc
