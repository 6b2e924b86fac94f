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

// Begins to copy 16 bytes into shared memory; zeros if not `there`.
PMC_DEVICE void copy_async(BFloat16* to, const BFloat16* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 16u : 0u)
               : "memory");
}
// The copies since the last such call are a group.
PMC_DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all of this thread's groups but the last kLeft.
template <int kLeft>
PMC_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four matrices of 8 x 8; lane 8 i + j gives the address of row j of matrix i.
PMC_DEVICE void load_matrices(uint32_t (&out)[4], const BFloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}
PMC_DEVICE void load_transposed(uint32_t (&out)[4], const BFloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// c += a b, of 16 x 16 and 16 x 8.
PMC_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b_0, uint32_t b_1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_0), "r"(b_1));
}

}  // namespace pmc

#include "decode_attention_kernel.h"
#include "decode_attention_mma.h"

namespace pmc {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("decode_attention on CUDA: ") + cudaGetErrorString(status));
  }
}

template <typename T>
void append(const DecodeAttention<T>& a, cudaStream_t stream) {
  append_kernel<T><<<static_cast<unsigned>(a.index.rows), 256, 0, stream>>>(a);
  check(cudaGetLastError());
}

template <typename T, int kDim>
void launch(const DecodeAttention<T>& a, cudaStream_t stream) {
  using C = typename SumOf<T>::Type;
  const Cuts cuts = cuts_of(a.heads / a.kv_heads);
  const int64_t units = a.index.rows * cuts.per_row;
  if (units > INT32_MAX || a.kv_heads > 65535) {
    throw std::invalid_argument("decode_attention on CUDA: too many rows or key/value heads for one launch");
  }
  append(a, stream);
  const auto kernels = {decode_attention_kernel<T, kDim, 1>, decode_attention_kernel<T, kDim, 2>,
                        decode_attention_kernel<T, kDim, 3>};
  const dim3 grid(static_cast<unsigned>(ceil_div(units, units_of_block(sizeof(C)))),
                  static_cast<unsigned>(a.kv_heads));
  const auto kernel = kernels.begin()[cuts.heads - 1];
  kernel<<<grid, threads_of_block(sizeof(C)), static_cast<size_t>(shared_bytes(a.dim, sizeof(C))), stream>>>(
      a, cuts, scales_of<C>(a));
  check(cudaGetLastError());
}

// Fewer rows a tile than fit, where else the card would have less than two blocks a multiprocessor: results
// are the same.
template <int kDim>
void launch_mma(const DecodeAttention<BFloat16>& a, int64_t tile_rows, cudaStream_t stream) {
  int device = 0, processors = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  Tiling tiling = tiling_of(a.heads / a.kv_heads, tile_rows);
  const int64_t heads = a.kv_heads * tiling.parts;  // thread blocks of a tile
  while (tile_rows == 0 && tiling.rows > 1 && ceil_div(a.index.rows, tiling.rows) * heads < 2 * processors) {
    tiling.rows = (tiling.rows + 1) / 2;
  }
  if (a.index.rows > INT32_MAX || a.kv_heads > 65535 || tiling.parts > 65535) {
    throw std::invalid_argument("decode_attention on CUDA: too many rows or key/value heads for one launch");
  }
  append(a, stream);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.index.rows, tiling.rows)),
                  static_cast<unsigned>(a.kv_heads), static_cast<unsigned>(tiling.parts));
  decode_attention_mma_kernel<kDim><<<grid, MmaShape<kDim>::splits * kWarp, MmaShape<kDim>::bytes, stream>>>(
      a, tiling, scales_of<float>(a));
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

std::pair<int64_t, int64_t> decode_attention_mma_block(int64_t dim) {
  if (dim > 128) return {MmaShape<256>::splits, MmaShape<256>::bytes};
  if (dim > 64) return {MmaShape<128>::splits, MmaShape<128>::bytes};
  return {MmaShape<64>::splits, MmaShape<64>::bytes};
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

void decode_attention_mma(const DecodeAttention<BFloat16>& a, int64_t tile_rows, cudaStream_t stream) {
  if (!serves(a)) return;
  if (a.dim % kTile || tile_rows < 0) {
    throw std::invalid_argument("decode_attention on CUDA, variant mma: a head of " + std::to_string(a.dim) +
                                " numbers in tiles of " + std::to_string(tile_rows) +
                                " rows: it serves multiples of 16 up to 256, and 0 or more rows");
  }
  if (a.dim > 128) {
    launch_mma<256>(a, tile_rows, stream);
  } else if (a.dim > 64) {
    launch_mma<128>(a, tile_rows, stream);
  } else {
    launch_mma<64>(a, tile_rows, stream);
  }
}

}  // namespace pmc
