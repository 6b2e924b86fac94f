#include <cstdint>
#include <stdexcept>
#include <string>

#include "decode_attention_cuda.h"

#define PMC_DEVICE __device__ __forceinline__

namespace pmc {

// Zeros if not `there`. With a branch in its place, or a choice, the compiler waits for each load before it
// begins the next.
template <typename P>
PMC_DEVICE P load_if(bool there, const P* from) {
  P out;
  asm volatile(
      "{\n\t.reg .pred there;\n\tsetp.ne.u32 there, %5, 0;\n\t"
      "mov.u32 %0, 0;\n\tmov.u32 %1, 0;\n\tmov.u32 %2, 0;\n\tmov.u32 %3, 0;\n\t"
      "@there ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=r"(out.words[0]), "=r"(out.words[1]), "=r"(out.words[2]), "=r"(out.words[3])
      : "l"(from), "r"(static_cast<unsigned>(there)));
  return out;
}

// exp2f without its care for results under 2^-126, which are 0 here
PMC_DEVICE float exp2_of(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
PMC_DEVICE double exp2_of(double x) { return exp2(x); }

}  // namespace pmc

#include "decode_attention_kernel.h"

namespace pmc {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("decode_attention on CUDA: ") + cudaGetErrorString(status));
  }
}

template <typename T, int kDim>
void launch(const DecodeAttention<T>& a, cudaStream_t stream) {
  using C = typename SumOf<T>::Type;
  const Cuts cuts = cuts_of(a.heads / a.kv_heads);
  const int64_t units = a.index.rows * cuts.per_row;
  if (units > INT32_MAX || a.kv_heads > 65535) {
    throw std::invalid_argument("decode_attention on CUDA: too many rows or key/value heads for one launch");
  }
  append_kernel<T><<<static_cast<unsigned>(a.index.rows), 256, 0, stream>>>(a);
  check(cudaGetLastError());
  const auto kernels = {decode_attention_kernel<T, kDim, 1>, decode_attention_kernel<T, kDim, 2>,
                        decode_attention_kernel<T, kDim, 3>};
  const dim3 grid(static_cast<unsigned>(ceil_div(units, units_of_block(sizeof(C)))),
                  static_cast<unsigned>(a.kv_heads));
  const auto kernel = kernels.begin()[cuts.heads - 1];
  kernel<<<grid, threads_of_block(sizeof(C)), static_cast<size_t>(shared_bytes(a.dim, sizeof(C))), stream>>>(
      a, cuts, scales_of<C>(a));
  check(cudaGetLastError());
}

template <typename T>
bool serves(const DecodeAttention<T>& a) {
  if (a.dim < kDimStep || a.dim > kMaxDim || a.dim % kDimStep) {
    throw std::invalid_argument("decode_attention on CUDA: a head of " + std::to_string(a.dim) +
                                " numbers: it serves multiples of 8 up to 256");
  }
  if (reinterpret_cast<uintptr_t>(a.k_pool) % kPackBytes ||
      reinterpret_cast<uintptr_t>(a.v_pool) % kPackBytes) {
    throw std::invalid_argument("decode_attention on CUDA: the pool must begin at a multiple of 16 bytes");
  }
  return a.index.rows > 0;
}

}  // namespace

std::pair<int64_t, int64_t> decode_attention_block(int64_t dim, int64_t size) {
  const int64_t sum_size = size == sizeof(double) ? sizeof(double) : sizeof(float);
  return {threads_of_block(sum_size) / kWarp, shared_bytes(dim, sum_size)};
}

// One kernel a power of two of dim where it is worth the time to build it: registers, not correctness, ask
// for them.
void decode_attention(const DecodeAttention<float>& a, cudaStream_t stream) {
  if (serves(a)) a.dim > 128 ? launch<float, 256>(a, stream) : launch<float, 128>(a, stream);
}

void decode_attention(const DecodeAttention<double>& a, cudaStream_t stream) {
  if (serves(a)) launch<double, 256>(a, stream);
}

void decode_attention(const DecodeAttention<BFloat16>& a, cudaStream_t stream) {
  if (!serves(a)) return;
  if (a.dim > 128) {
    launch<BFloat16, 256>(a, stream);
  } else if (a.dim > 64) {
    launch<BFloat16, 128>(a, stream);
  } else {
    launch<BFloat16, 64>(a, stream);
  }
}

}  // namespace pmc
