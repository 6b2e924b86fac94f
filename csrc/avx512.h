// Helpers shared by the AVX-512 kernels.
#pragma once

#include "simd.h"

#ifdef PMC_X86
#include <immintrin.h>

#include <algorithm>

namespace pmc {

PMC_AVX512 inline __mmask16 tail_mask(int64_t left) {
  return left >= 16 ? static_cast<__mmask16>(0xFFFF) : static_cast<__mmask16>((1u << left) - 1);
}

// Returns a vector whose lane j is the sum of the 16 lanes of v[j].
PMC_AVX512 inline __m512 sum_lanes(const __m512* v) {
  __m512 s[8], q[4];
  for (int i = 0; i < 8; ++i) {
    s[i] =
        _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(s[2 * i]), b = _mm512_castps_pd(s[2 * i + 1]);
    q[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = q[2 * i], b = q[2 * i + 1];
    s[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[1], 0x88), _mm512_shuffle_f32x4(s[0], s[1], 0xdd));
}

// to[k][16] = from[column * ld + k], columns past `columns` repeat the last. Fetches what lies 16 columns on.
PMC_AVX512 inline void turn16(const float* from, int64_t ld, int64_t columns, int64_t depth, float* to,
                              int64_t to_ld) {
  const float* source[16];
  for (int64_t j = 0; j < 16; ++j) source[j] = from + std::min(j, columns - 1) * ld;
  for (int64_t k = 0; k < depth; k += 16) {
    const __mmask16 mask = tail_mask(depth - k);
    __m512 r[16], t[16];
    for (int j = 0; j < 16; ++j) {
      r[j] = _mm512_maskz_loadu_ps(mask, source[j] + k);
      _mm_prefetch(reinterpret_cast<const char*>(source[j] + 16 * ld + k), _MM_HINT_T0);
    }
    for (int j = 0; j < 16; j += 2) {
      t[j] = _mm512_unpacklo_ps(r[j], r[j + 1]);
      t[j + 1] = _mm512_unpackhi_ps(r[j], r[j + 1]);
    }
    for (int j = 0; j < 16; j += 4) {
      r[j] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[j]), _mm512_castps_pd(t[j + 2])));
      r[j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[j]), _mm512_castps_pd(t[j + 2])));
      r[j + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[j + 1]), _mm512_castps_pd(t[j + 3])));
      r[j + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[j + 1]), _mm512_castps_pd(t[j + 3])));
    }
    // r[4 g + i] holds, in 128-bit lane l, number k = 4 l + i of columns 4 g .. 4 g + 3
    for (int i = 0; i < 4; ++i) {
      const __m512 a0 = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
      const __m512 a1 = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
      const __m512 b0 = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
      const __m512 b1 = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
      t[i] = _mm512_shuffle_f32x4(a0, a1, 0x88);
      t[8 + i] = _mm512_shuffle_f32x4(a0, a1, 0xdd);
      t[4 + i] = _mm512_shuffle_f32x4(b0, b1, 0x88);
      t[12 + i] = _mm512_shuffle_f32x4(b0, b1, 0xdd);
    }
    const int64_t count = std::min<int64_t>(16, depth - k);
    for (int64_t i = 0; i < count; ++i) _mm512_store_ps(to + (k + i) * to_ld, t[i]);
  }
}

}  // namespace pmc
#endif
