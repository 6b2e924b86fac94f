// Attention of a step's rows over the key/value pool: the prompt of a question once for all its rows, then
// each row's own suffix. The index arithmetic is shared with the CUDA kernel.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(__CUDACC__)
#define PMC_SHARED __host__ __device__ __forceinline__
#else
#define PMC_SHARED inline
#endif

namespace pmc {

// Brain float as stored; computed with as float.
struct BFloat16 {
  uint16_t bits;
};

// Which slots each row sees (StepPlan in rollout_trie.h).
struct StepIndex {
  const int32_t* slots;       // [rows], of the row's own token
  const int32_t* prefix_len;  // [rows]
  const int32_t* cu_suffix;   // [rows + 1]
  const int32_t* suffix;
  const int32_t* cu_rows;    // [blocks + 1]
  const int32_t* cu_prefix;  // [blocks + 1]
  const int32_t* prefix;
  int64_t rows, blocks;
};

// Keys that a row sees: prefix[prefix_begin .. prefix_end) of its block, then suffix[suffix_begin ..
// suffix_end).
struct Span {
  int32_t prefix_begin, prefix_end, suffix_begin, suffix_end;
};

// window: a row sees that many last keys, itself included; 0: all.
PMC_SHARED Span span_of(const StepIndex& index, int64_t row, int64_t window) {
  Span s{0, index.prefix_len[row], index.cu_suffix[row], index.cu_suffix[row + 1]};
  const int64_t keys = s.prefix_end + (s.suffix_end - s.suffix_begin);
  if (window > 0 && keys > window) {
    const int32_t hidden = static_cast<int32_t>(keys - window);
    s.prefix_begin = hidden < s.prefix_end ? hidden : s.prefix_end;
    s.suffix_begin += hidden - s.prefix_begin;
  }
  return s;
}

template <typename T>
struct DecodeAttention {
  const T *q, *k, *v;  // [rows, heads, dim], [rows, kv_heads, dim] each; dim contiguous
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides
  T *k_pool, *v_pool;  // [slots, kv_heads, dim]; k and v are written there before any row reads
  T* out;              // [rows, heads, dim]
  int64_t heads, kv_heads, dim;
  double scale, softcap;  // softcap 0: none
  int64_t window;
  StepIndex index;
};

void decode_attention(const DecodeAttention<float>& args, Isa isa, int threads);
void decode_attention(const DecodeAttention<double>& args, Isa isa, int threads);
void decode_attention(const DecodeAttention<BFloat16>& args, Isa isa, int threads);

}  // namespace pmc
