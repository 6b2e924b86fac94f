// A variant of decode_attention_kernel.h on tensor cores: bfloat16, heads of a multiple of 16 numbers.
// Without its launch, so that a test runs it on the CPU.
//
// A tile is 16 queries: those of some neighbouring rows whose heads share a key/value head. A warp multiplies
// all of them with 16 keys at once, a turn, and kSplits warps share the turns. Keys and values come from the
// pool by asynchronous copies: while a warp multiplies the keys of a turn, their values are under way, and
// while it adds up values, so are the next keys.
//
// Which turns a row sees follows from that row alone. Of the prompt's turns, at multiples of 16, those that
// it sees whole: they are read once for all rows of a tile that see them. Then its own: what else it sees of
// the prompt, and its suffix, as one list. So a row sees all of a turn or nothing, and of what others see not
// even a NaN reaches it. Its n-th turn, both counted, is its n % kSplits-th warp's. Hence a row's result does
// not depend on how rows are cut into tiles, or on the rest of the step.
//
// Scores, weights and sums are float32. A product takes bfloat16: a weight is the sum of two of them, exact
// to 2^-16.
#pragma once

#include "decode_attention_kernel.h"

namespace pmc {

constexpr int kTile = 16;  // queries of a tile, keys of a turn: a side of an mma; head sizes are multiples

// Heads that share a key/value head, cut in parts of up to 16, and rows of a tile.
struct Tiling {
  int32_t group, parts, heads, rows;  // heads: of a part, the last may have fewer
};

// rows 0: as many as fit
PMC_SHARED Tiling tiling_of(int64_t group, int64_t rows) {
  const int64_t parts = ceil_div(group, kTile), heads = ceil_div(group, parts), most = kTile / heads;
  return {static_cast<int32_t>(group), static_cast<int32_t>(parts), static_cast<int32_t>(heads),
          static_cast<int32_t>(rows > 0 && rows < most ? rows : most)};
}

// What a row sees. The prompt's turns `first` to `last`, and own keys: `head` from `begin` on in the prompt,
// `tail` behind the last turn there, the rest in the suffix.
struct RowKeys {
  int32_t question, prefix;  // prefix: where the question's slots begin
  int32_t first, last, begin, head, tail, suffix, own;
};

// Sizes for heads of up to kDim numbers. Rows in shared memory lie 16 bytes further apart than they are long:
// the 8 that are read at once then lie in different banks.
template <int kDim>
struct MmaShape {
  static constexpr int splits = kDim > 128 ? 2 : 4;   // warps of a block: no card has less than 48 KiB for it
  static constexpr int blocks = kDim == 128 ? 4 : 0;  // of a multiprocessor; 0: any
  static constexpr int stride = kDim + 8;
  static constexpr int buffer = 2 * kTile * stride;  // of a warp: keys and values of a turn
  static constexpr int64_t bytes =
      (kTile * stride + splits * buffer) * int64_t{sizeof(BFloat16)} + kTile * int64_t{sizeof(RowKeys)};
  // later a warp's sums lie in its buffer: of each query kDim, a peak and a sum
  static_assert(kTile * (kDim + 2) * sizeof(float) <= buffer * sizeof(BFloat16), "sums fit the buffer");
};

#ifdef PMC_DEVICE

PMC_DEVICE RowKeys keys_of(const StepIndex& index, int row, int question, int64_t window) {
  const Span s = span_of(index, row, window);
  const int last = s.prefix_end / kTile;
  int first = (s.prefix_begin + kTile - 1) / kTile, head_end = first * kTile,
      tail = s.prefix_end - last * kTile;
  if (first >= last) {  // it sees no turn whole
    first = last;
    head_end = s.prefix_end;
    tail = 0;
  }
  const int head = head_end - s.prefix_begin;
  return {question,
          index.cu_prefix[question],
          first,
          last,
          s.prefix_begin,
          head,
          tail,
          s.suffix_begin,
          head + tail + s.suffix_end - s.suffix_begin};
}

// A warp's turn: the 16 keys number `at` of segment 2 n, the prompt that begins with row n of the tile, or
// 2 n + 1, row n's own keys, counted on from the prompt's turns.
struct Turn {
  int segment, at, end;
};

template <int kWarps>
PMC_DEVICE void advance(const RowKeys* keys, int rows, int split, Turn& turn) {
  turn.at += kWarps;
  while (turn.at >= turn.end && ++turn.segment < 2 * rows) {
    const int row = turn.segment / 2;
    const RowKeys& k = keys[row];
    int begin = k.last;
    turn.end = begin + (k.own + kTile - 1) / kTile;
    if (turn.segment % 2 == 0) {
      const bool leads = row == 0 || keys[row - 1].question != k.question;
      begin = k.first;
      turn.end = leads ? k.last : begin;
      for (int r = row + 1; leads && r < rows && keys[r].question == k.question; ++r) {
        begin = begin < keys[r].first ? begin : keys[r].first;
        turn.end = turn.end > keys[r].last ? turn.end : keys[r].last;
      }
    }
    turn.at = begin + (split + kWarps - begin % kWarps) % kWarps;
  }
}

// The slot of key i of a turn; -1: it has fewer, or there is no such turn.
PMC_DEVICE int slot_of(const StepIndex& index, const RowKeys* keys, int rows, const Turn& turn, int i) {
  if (turn.segment >= 2 * rows) return -1;
  const RowKeys& k = keys[turn.segment / 2];
  if (turn.segment % 2 == 0) return index.prefix[k.prefix + turn.at * kTile + i];
  const int key = (turn.at - k.last) * kTile + i, suffix = key - k.head - k.tail;
  if (key >= k.own) return -1;
  if (suffix >= 0) return index.suffix[k.suffix + suffix];
  return index.prefix[k.prefix + (key < k.head ? k.begin + key : k.last * kTile + key - k.head)];
}

// Begins to copy a turn's keys, or values, into a buffer; zeros where there are none. `stride` is a slot's,
// `offset` where the head begins in it. Lane i or i + 16 has key i's slot; 8 lanes copy 128 bytes of a key at
// once.
template <int kDim>
PMC_DEVICE void copy_turn(const BFloat16* pool, int stride, int offset, int dim, int slot, int lane,
                          BFloat16* buffer) {
#pragma unroll
  for (int key = lane / 8; key < kTile; key += kWarp / 8) {
    const int from = __shfl_sync(0xFFFFFFFFu, slot, key);
    const BFloat16* const source = pool + (int64_t{from < 0 ? 0 : from} * stride + offset);
#pragma unroll
    for (int at = 0; at < kDim; at += 64) {
      const int d = at + lane % 8 * 8;
      if (d < dim) copy_async(buffer + key * MmaShape<kDim>::stride + d, source + d, from >= 0);
    }
  }
  close_copies();
}

// Two float32 numbers as bfloat16, cut off, in one register.
PMC_DEVICE uint32_t high_halves(float first, float second) {
  uint32_t bits[2];
  memcpy(bits, &first, sizeof first);
  memcpy(bits + 1, &second, sizeof second);
  return bits[0] >> 16 | (bits[1] & 0xFFFF0000u);
}

// What cutting leaves of a number.
PMC_DEVICE float rest_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof x);
  return x - as_float(bits & 0xFFFF0000u);
}

// Thread block (tile, kv_head, part of its group), of ceil_div(rows, tiling.rows) x kv_heads x parts.
// A lane has numbers of queries lane / 4 and lane / 4 + 8 of the tile, as mma.m16n8k16 lays them out: in
// `score` of keys lane % 4 * 2, the next and the same 8 on, in `out` of every 8 numbers two.
template <int kDim>
__global__ void __launch_bounds__(MmaShape<kDim>::splits* kWarp, MmaShape<kDim>::blocks)
    decode_attention_mma_kernel(const DecodeAttention<BFloat16> a, const Tiling tiling,
                                const Scales<float> scales) {
  using S = MmaShape<kDim>;
  extern __shared__ uint4 decode_shared[];
  BFloat16* const queries = reinterpret_cast<BFloat16*>(decode_shared);
  BFloat16* const buffers = queries + kTile * S::stride;
  RowKeys* const keys = reinterpret_cast<RowKeys*>(buffers + S::splits * S::buffer);
  const int lane = static_cast<int>(threadIdx.x % kWarp), split = static_cast<int>(threadIdx.x / kWarp);
  const int dim = static_cast<int>(a.dim), first_row = static_cast<int>(blockIdx.x) * tiling.rows;
  const int left = static_cast<int>(a.index.rows) - first_row, rows = left < tiling.rows ? left : tiling.rows;
  const int kv_head = static_cast<int>(blockIdx.y), first_head = static_cast<int>(blockIdx.z) * tiling.heads;
  const int heads = tiling.group - first_head < tiling.heads ? tiling.group - first_head : tiling.heads;
  const int head = kv_head * tiling.group + first_head;
  const int stride = static_cast<int>(a.kv_heads) * dim, offset = kv_head * dim;
  BFloat16* const k_turn = buffers + split * S::buffer;
  BFloat16* const v_turn = k_turn + kTile * S::stride;

  for (int row = split; row < rows; row += S::splits) {
    const int question = question_of(a.index, first_row + row, lane);
    if (lane == 0) keys[row] = keys_of(a.index, first_row + row, question, a.window);
  }
  for (int at = static_cast<int>(threadIdx.x); at < kTile * dim; at += S::splits * kWarp) {
    const int m = at / dim, d = at - m * dim, row = m / heads;
    const BFloat16* const query = a.q + (first_row + row) * a.q_row + (head + m - row * heads) * a.q_head;
    queries[m * S::stride + d] = row < rows ? query[d] : BFloat16{0};
  }
  __syncthreads();

  const int row_of[2] = {lane / 4 / heads, (lane / 4 + 8) / heads};  // of the lane's queries, in the tile
  float out[kDim / 8][4] = {}, peak[2] = {kNothing<float>, kNothing<float>}, sum[2] = {0, 0};
  Turn turn{-1, 0, 0};
  advance<S::splits>(keys, rows, split, turn);
  int slot = slot_of(a.index, keys, rows, turn, lane % kTile);
  copy_turn<kDim>(a.k_pool, stride, offset, dim, slot, lane, k_turn);
  copy_turn<kDim>(a.v_pool, stride, offset, dim, slot, lane, v_turn);
  Turn next = turn;
  advance<S::splits>(keys, rows, split, next);
  slot = slot_of(a.index, keys, rows, next, lane % kTile);
  while (turn.segment < 2 * rows) {
    wait_for_copies<1>();
    __syncwarp();  // all lanes' keys are there
    float score[2][4] = {};
#pragma unroll 2
    for (int d = 0; d < dim; d += 16) {
      uint32_t q[4], k[4];
      load_matrices(q, queries + lane % 16 * S::stride + d + lane / 16 * 8);
      load_matrices(k, k_turn + (lane / 16 * 8 + lane % 8) * S::stride + d + lane / 8 % 2 * 8);
      multiply(score[0], q, k[0], k[1]);
      multiply(score[1], q, k[2], k[3]);
    }
    __syncwarp();  // all have read them
    copy_turn<kDim>(a.k_pool, stride, offset, dim, slot, lane, k_turn);

    const RowKeys& own = keys[turn.segment / 2];
    const int count = turn.segment % 2 ? own.own - (turn.at - own.last) * kTile : kTile;
    bool sees[2];
    float keep[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of[i] < rows ? row_of[i] : 0;
      const RowKeys& k = keys[row];
      sees[i] = row_of[i] < rows &&
                (turn.segment % 2 ? row == turn.segment / 2
                                  : k.question == own.question && k.first <= turn.at && turn.at < k.last);
      float highest = peak[i];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float& z = score[n / 2][2 * i + n % 2];
        z *= scales.query;
        if (scales.cap > 0) z = scales.cap * std::tanh(z);
        if (n / 2 * 8 + lane % 4 * 2 + n % 2 >= count) z = -INFINITY;
        highest = std::fmax(highest, z);
      }
      highest = std::fmax(highest, __shfl_xor_sync(0xFFFFFFFFu, highest, 1));
      highest = std::fmax(highest, __shfl_xor_sync(0xFFFFFFFFu, highest, 2));
      keep[i] = exp2_of(peak[i] - highest);
      float total = sum[i] * keep[i];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float& z = score[n / 2][2 * i + n % 2];
        z = exp2_of(z - highest);
        total += z;
      }
      peak[i] = sees[i] ? highest : peak[i];
      sum[i] = sees[i] ? total : sum[i];
    }
    uint32_t high[4], low[4];  // rows of weights: two numbers each of score[n / 2], queries n % 2
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float first = score[n / 2][n % 2 * 2], second = score[n / 2][n % 2 * 2 + 1];
      high[n] = high_halves(first, second);
      low[n] = high_halves(rest_of(first), rest_of(second));
    }

    wait_for_copies<1>();
    __syncwarp();  // all lanes' values are there
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      if (d >= dim) break;
      uint32_t v[4];
      load_transposed(v, v_turn + lane % 16 * S::stride + d + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float (&so_far)[4] = out[d / 8 + n];
        float made[4] = {so_far[0] * keep[0], so_far[1] * keep[0], so_far[2] * keep[1], so_far[3] * keep[1]};
        multiply(made, high, v[2 * n], v[2 * n + 1]);
        multiply(made, low, v[2 * n], v[2 * n + 1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) so_far[e] = sees[e / 2] ? made[e] : so_far[e];
      }
    }
    __syncwarp();  // all have read them
    copy_turn<kDim>(a.v_pool, stride, offset, dim, slot, lane, v_turn);
    turn = next;
    advance<S::splits>(keys, rows, split, next);
    slot = slot_of(a.index, keys, rows, next, lane % kTile);
  }

  wait_for_copies<0>();
  __syncwarp();
  constexpr int kApart = S::buffer * int{sizeof(BFloat16)} / int{sizeof(float)};
  float* const parts = reinterpret_cast<float*>(buffers);
  float* const mine = parts + split * kApart;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int m = lane / 4 + 8 * i;
    sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], 1);
    sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], 2);
    if (lane % 4 == 0) {
      mine[kTile * kDim + m] = peak[i];
      mine[kTile * (kDim + 1) + m] = sum[i];
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      float* const to = mine + m * kDim + n * 8 + lane % 4 * 2;
      to[0] = out[n][2 * i];
      to[1] = out[n][2 * i + 1];
    }
  }
  __syncthreads();
  for (int m = split; m < rows * heads; m += S::splits) {
    const int row = m / heads;
    merge_splits<S::splits, kDim>(parts + m * kDim, parts + kTile * kDim + m, parts + kTile * (kDim + 1) + m,
                                  kApart, dim, lane,
                                  a.out + ((first_row + row) * a.heads + head + m - row * heads) * a.dim);
  }
}

#endif  // PMC_DEVICE

}  // namespace pmc
