// Launches decode_attention on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "decode_attention.h"

namespace pmc {

// All addresses are of the current device. Nothing is allocated, waited for or read back: a stream that is
// being captured takes it. Throws std::invalid_argument for sizes that the kernel does not serve, and
// std::runtime_error with CUDA's word for a launch that fails.
void decode_attention(const DecodeAttention<float>& args, cudaStream_t stream);
void decode_attention(const DecodeAttention<double>& args, cudaStream_t stream);
void decode_attention(const DecodeAttention<BFloat16>& args, cudaStream_t stream);

// The variant on tensor cores, for heads of a multiple of 16 numbers, otherwise the same. tile_rows: rows
// that share a tile, 0: chosen here; results do not depend on it.
void decode_attention_mma(const DecodeAttention<BFloat16>& args, int64_t tile_rows, cudaStream_t stream);

// Warps and bytes of shared memory of a thread block for heads of `dim` numbers of `size` bytes.
std::pair<int64_t, int64_t> decode_attention_block(int64_t dim, int64_t size);
std::pair<int64_t, int64_t> decode_attention_mma_block(int64_t dim);

}  // namespace pmc
