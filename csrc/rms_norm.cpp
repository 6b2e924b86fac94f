#include "rms_norm.h"

#include <cmath>

#include "parallel.h"

namespace pmc {
namespace {

constexpr int64_t kAlone = 1 << 16;  // numbers that are not worth a second thread

PMC_INLINE void some_rows(const RmsNorm& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* x = a.x + r * a.size;
    float* y = a.y + r * a.size;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= a.size; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) lanes[k] += x[i + k] * x[i + k];
    }
    double sum = 0;
    for (; i < a.size; ++i) sum += x[i] * x[i];
    for (int k = 0; k < kLanes; ++k) sum += lanes[k];
    const float scale = 1.0f / std::sqrt(static_cast<float>(sum / a.size) + a.eps);
    for (i = 0; i < a.size; ++i) y[i] = (x[i] * scale) * (a.weight[i] + a.offset);
  }
}

#ifdef PMC_X86
PMC_AVX512 void rows_avx512(const RmsNorm& a, int64_t begin, int64_t end) { some_rows(a, begin, end); }
PMC_AVX2 void rows_avx2(const RmsNorm& a, int64_t begin, int64_t end) { some_rows(a, begin, end); }
#endif
void rows_generic(const RmsNorm& a, int64_t begin, int64_t end) { some_rows(a, begin, end); }

}  // namespace

void rms_norm(const RmsNorm& args, Isa isa, int threads) {
  auto* rows = &rows_generic;
#ifdef PMC_X86
  if (isa == Isa::kAvx2) rows = &rows_avx2;
  if (isa == Isa::kAvx512) rows = &rows_avx512;
#endif
  parallel_for(args.rows, args.rows * args.size < kAlone ? 1 : threads,
               [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

}  // namespace pmc
