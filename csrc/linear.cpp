#include "linear.h"

#include <algorithm>
#include <stdexcept>

#include "avx512.h"
#include "parallel.h"

namespace pmc {

#ifdef PMC_X86
namespace {

constexpr int64_t kTile = 6;     // rows of x at once: 6 x 4 sums fill the registers
constexpr int64_t kStripe = 12;  // rows of weight that stay in the first-level cache while all tiles use them
constexpr int64_t kAhead = 32;   // rows of weight fetched ahead where each is used once

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
    for (int j = 0; j < NR; ++j) {
      a.y[(m + i) * a.out + n + j] = total[i * NR + j] + (a.bias ? a.bias[n + j] : 0.0f);
    }
  }
}

template <int MR, int NR>
PMC_AVX512 void dot_columns(const Linear& a, int64_t m, int64_t begin, int64_t end, int64_t ahead) {
  int64_t n = begin;
  for (; n + NR <= end; n += NR) dot_tile<MR, NR>(a, m, n, ahead);
  for (; n < end; ++n) dot_tile<MR, 1>(a, m, n, ahead);
}

using Columns = void (*)(const Linear&, int64_t, int64_t, int64_t, int64_t);
constexpr Columns kColumns[kTile] = {dot_columns<1, 8>, dot_columns<2, 8>, dot_columns<3, 6>,
                                     dot_columns<4, 6>, dot_columns<5, 4>, dot_columns<6, 4>};

void columns(const Linear& a, int64_t begin, int64_t end) {
  const int64_t tiles = (a.rows + kTile - 1) / kTile;
  const int64_t stripe = tiles == 1 ? end - begin : kStripe;
  const int64_t ahead = (tiles == 1 ? kAhead : kStripe) * a.in;
  for (int64_t n = begin; n < end; n += stripe) {
    const int64_t stop = std::min(end, n + stripe);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = a.rows * t / tiles, size = a.rows * (t + 1) / tiles - m;
      kColumns[size - 1](a, m, n, stop, ahead);
    }
  }
}

}  // namespace

void linear(const Linear& a, int threads) {
  parallel_for(a.out, threads, [&](int64_t begin, int64_t end) { columns(a, begin, end); });
}
#else
void linear(const Linear&, int) { throw std::logic_error("linear needs AVX-512"); }
#endif

}  // namespace pmc
