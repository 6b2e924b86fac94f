#include "linear.h"

#include <algorithm>
#include <stdexcept>

#include "avx512.h"
#include "parallel.h"

namespace pmc {

#ifdef PMC_X86
namespace {

namespace avx512 {

#define PMC_TARGET PMC_AVX512
using Vec = __m512;
constexpr int64_t kWidth = 16, kTile = 6;  // 6 x 4 sums, of 32 registers

PMC_TARGET inline Vec zero() { return _mm512_setzero_ps(); }
PMC_TARGET inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
PMC_TARGET inline Vec load_part(const float* from, int64_t size) {
  return _mm512_maskz_loadu_ps(tail_mask(size), from);
}
PMC_TARGET inline Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
PMC_TARGET inline void store_sums(const Vec* v, int n, float* out) {
  for (int i = 0; i < n; i += 16) {
    Vec part[16] = {};
    for (int j = 0; j < std::min(16, n - i); ++j) part[j] = v[i + j];
    _mm512_mask_storeu_ps(out + i, tail_mask(n - i), sum_lanes(part));
  }
}

#include "linear_tiles.h"

constexpr Columns kColumns[kTile] = {dot_columns<1, 8>, dot_columns<2, 8>, dot_columns<3, 6>,
                                     dot_columns<4, 6>, dot_columns<5, 4>, dot_columns<6, 4>};
#undef PMC_TARGET

}  // namespace avx512

namespace avx2 {

#define PMC_TARGET PMC_AVX2
using Vec = __m256;
constexpr int64_t kWidth = 8, kTile = 4;  // 4 x 3 sums, of 16 registers

PMC_TARGET inline Vec zero() { return _mm256_setzero_ps(); }
PMC_TARGET inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
PMC_TARGET inline Vec load_part(const float* from, int64_t size) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(size)), lane));
}
PMC_TARGET inline Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
PMC_TARGET inline void store_sums(const Vec* v, int n, float* out) {
  for (int i = 0; i < n; i += 4) {
    const Vec none = zero();
    const Vec a = _mm256_hadd_ps(v[i], i + 1 < n ? v[i + 1] : none);
    const Vec b = _mm256_hadd_ps(i + 2 < n ? v[i + 2] : none, i + 3 < n ? v[i + 3] : none);
    const Vec c = _mm256_hadd_ps(a, b);
    const __m128 total = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
    float four[4];
    _mm_storeu_ps(four, total);
    std::copy_n(four, std::min(4, n - i), out + i);
  }
}

#include "linear_tiles.h"

constexpr Columns kColumns[kTile] = {dot_columns<1, 8>, dot_columns<2, 4>, dot_columns<3, 4>,
                                     dot_columns<4, 3>};
#undef PMC_TARGET

}  // namespace avx2

}  // namespace

void linear(const Linear& a, Isa isa, int threads) {
  parallel_for(a.out, threads, [&](int64_t begin, int64_t end) {
    if (isa == Isa::kAvx512) {
      avx512::stripes(a, begin, end, avx512::kColumns);
    } else {
      avx2::stripes(a, begin, end, avx2::kColumns);
    }
  });
}
#else
void linear(const Linear&, Isa, int) { throw std::logic_error("linear needs AVX2 or AVX-512"); }
#endif

}  // namespace pmc
