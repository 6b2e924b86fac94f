#include <cstdint>
#include <stdexcept>
#include <string>

#include "decode_attention_cuda.h"

#define PMC_DEVICE __device__ __forceinline__

namespace pmc {

// cp.async: the bytes go from L2 to shared memory without a register, and a thread has all of its copies in
// flight at once.
template <typename P>
PMC_DEVICE void copy_pack(P* shared, const P* global) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
}
PMC_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace pmc

#include "decode_attention_kernel.h"

namespace pmc {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("decode_attention on CUDA: ") + cudaGetErrorString(status));
  }
}

template <typename T, int kPairs>
void launch(const DecodeAttention<T>& a, cudaStream_t stream) {
  using C = typename SumOf<T>::Type;
  int device, limit;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const int64_t warps = warps_within(limit, a.dim, sizeof(T), sizeof(C));
  if (warps == 0) {
    throw std::invalid_argument(
        "decode_attention on CUDA: this card's shared memory does not hold 32 keys of " +
        std::to_string(a.dim) + " numbers of " + std::to_string(sizeof(T)) + " bytes");
  }
  const Tiling tiling = tiling_of(a.heads / a.kv_heads, warps);
  const int64_t tiles = tile_begin(tiling, a.index.rows, a.index.blocks);
  if (tiles > INT32_MAX || a.kv_heads > 65535) {
    throw std::invalid_argument("decode_attention on CUDA: too many rows or key/value heads for one launch");
  }
  const int bytes = static_cast<int>(layout_of(warps, a.dim, sizeof(T), sizeof(C)).bytes);
  const auto kernel = decode_attention_kernel<T, kPairs>;
  // of this device, which need not be the last call's
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  append_kernel<T><<<static_cast<unsigned>(a.index.rows), 256, 0, stream>>>(a);
  check(cudaGetLastError());
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(a.kv_heads));
  kernel<<<grid, static_cast<unsigned>(warps * kWarp), bytes, stream>>>(a, tiling);
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

std::pair<int64_t, int64_t> decode_attention_block(int64_t dim, int64_t size, int64_t limit) {
  const int64_t sum_size = size == sizeof(double) ? sizeof(double) : sizeof(float);
  const int64_t warps = warps_within(limit, dim, size, sum_size);
  return {warps, layout_of(warps, dim, size, sum_size).bytes};
}

// One kernel a power of two of dim where it is worth the time to build it: registers, not correctness, ask
// for them.
void decode_attention(const DecodeAttention<float>& a, cudaStream_t stream) {
  if (serves(a)) a.dim > 128 ? launch<float, 4>(a, stream) : launch<float, 2>(a, stream);
}

void decode_attention(const DecodeAttention<double>& a, cudaStream_t stream) {
  if (serves(a)) launch<double, 4>(a, stream);
}

void decode_attention(const DecodeAttention<BFloat16>& a, cudaStream_t stream) {
  if (!serves(a)) return;
  if (a.dim > 128) {
    launch<BFloat16, 4>(a, stream);
  } else if (a.dim > 64) {
    launch<BFloat16, 2>(a, stream);
  } else {
    launch<BFloat16, 1>(a, stream);
  }
}

}  // namespace pmc
