// Runs csrc/decode_attention_kernel.h and decode_attention_mma.h on the CPU: every CUDA thread is a fiber
// that runs until it waits for others. It finds wrong indices and barriers that not all threads reach; with
// threads run in several orders, also missing barriers. What an asynchronous copy writes is NaN until it is
// waited for. It says nothing about speed.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "decode_attention.h"

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
struct alignas(16) uint4 {
  uint32_t x[4];
};
static Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace pmc {
constexpr size_t kShared = 48 << 10;  // what a block may have on any card
uint4 decode_shared[kShared / sizeof(uint4)];
}  // namespace pmc

namespace {

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  const Barrier* waits = nullptr;
  int64_t until = 0;
  bool done = false;
  std::vector<std::vector<Copy>> copies{1};  // groups of asynchronous ones; the last is not closed
  std::vector<Copy> landed;                  // waited for, but no barrier has shown them to the others
  int exchanges = 0;
};

// What a thread shows the others of its warp.
struct Message {
  alignas(8) unsigned char bytes[24];
};

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::abort();
}

std::vector<Fiber> fibers;
std::vector<Barrier> warps;
std::vector<Message> exchanged[2];  // of each thread, of its last exchange and of the one before
Barrier block;
ucontext_t scheduler;
std::function<void()> body;

void wait_at(Barrier& barrier, int threads) {
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    Fiber& me = fibers[threadIdx.x];
    me.waits = &barrier;
    me.until = generation + 1;
    swapcontext(&me.context, &scheduler);
    me.waits = nullptr;
  }
}

// Shows all threads what this one's asynchronous copies wrote, as far as it has waited for them.
void show_copies() {
  for (const Copy& copy : fibers[threadIdx.x].landed) {
    if (copy.from) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  fibers[threadIdx.x].landed.clear();
}

void __syncthreads() {
  show_copies();
  wait_at(block, static_cast<int>(blockDim.x));
}
void __syncwarp() {
  show_copies();
  wait_at(warps[threadIdx.x / 32], 32);
}

// Shows the warp a value; returns the first of the warp's messages. They last until the next exchange but
// one, which no thread begins before all have come to the next.
template <typename T>
const Message* exchange(const T& mine) {
  static_assert(sizeof(T) <= sizeof(Message), "");
  std::vector<Message>& messages = exchanged[fibers[threadIdx.x].exchanges++ % 2];
  std::memcpy(&messages[threadIdx.x], &mine, sizeof mine);
  wait_at(warps[threadIdx.x / 32], 32);  // shows no thread what another has written to memory
  return &messages[threadIdx.x / 32 * 32];
}

template <typename T>
T read(const Message& message) {
  T out;
  std::memcpy(&out, &message, sizeof out);
  return out;
}

template <typename T>
T __shfl_sync(unsigned, T mine, int lane) {
  return read<T>(exchange(mine)[lane]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T mine, int lanes) {
  return __shfl_sync(mask, mine, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

unsigned __ballot_sync(unsigned, bool mine) {
  const Message* const all = exchange(mine);
  unsigned out = 0;
  for (unsigned lane = 0; lane < 32; ++lane) out |= unsigned{read<bool>(all[lane])} << lane;
  return out;
}
int __popc(unsigned bits) { return __builtin_popcount(bits); }

void run_fiber() {
  body();
  Fiber& me = fibers[threadIdx.x];
  if (me.copies.size() > 1 || !me.copies[0].empty() || !me.landed.empty())
    fail("an asynchronous copy that nobody waits for");
  me.done = true;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

void run_block(std::vector<int>& order, std::mt19937* shuffle) {
  std::memset(pmc::decode_shared, 0xFF, sizeof pmc::decode_shared);  // NaN
  block = {};
  std::fill(warps.begin(), warps.end(), Barrier{});
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    fiber.waits = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = 1 << 16;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &run_fiber, 0);
  }
  for (size_t left = fibers.size(); left > 0;) {
    bool moved = false;
    if (shuffle) std::shuffle(order.begin(), order.end(), *shuffle);
    for (int i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.done || (fiber.waits && fiber.waits->generation < fiber.until)) continue;
      threadIdx.x = static_cast<unsigned>(i);
      swapcontext(&scheduler, &fiber.context);
      moved = true;
      left -= fiber.done;
    }
    if (!moved) fail("a barrier that not all threads reach");
  }
}

// seed 0: threads in order; 1: backwards; else in random orders
void launch(Index3 grid, unsigned threads, size_t bytes, unsigned seed, std::function<void()> kernel) {
  body = std::move(kernel);
  fibers.clear();
  fibers.resize(threads);
  warps.assign(threads / 32, {});
  for (auto& messages : exchanged) messages.assign(threads, {});
  gridDim = grid;
  blockDim = {threads, 1, 1};
  std::mt19937 random(seed);
  std::vector<int> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = static_cast<int>(seed == 1 ? threads - 1 - i : i);
  for (unsigned n = 0; n < grid.x * grid.y * grid.z; ++n) {
    blockIdx = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
    run_block(order, seed > 1 ? &random : nullptr);
    const auto* shared = reinterpret_cast<const unsigned char*>(pmc::decode_shared);
    if (std::any_of(shared + bytes, shared + pmc::kShared, [](unsigned char c) { return c != 0xFF; })) {
      fail("shared memory written past its end");
    }
  }
}

}  // namespace

#define __global__
#define __shared__
#define __launch_bounds__(...)
#define PMC_DEVICE static inline

namespace pmc {
template <typename P>
PMC_DEVICE P load_if(bool there, const P* from) {
  if (there && reinterpret_cast<uintptr_t>(from) % 16) fail("a load that is not aligned");
  return there ? *from : P{};
}
template <typename C>
PMC_DEVICE C exp2_of(C x) {
  return std::exp2(x);
}

PMC_DEVICE void copy_async(BFloat16* to, const BFloat16* from, bool there) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fail("an asynchronous copy that is not aligned");
  }
  std::memset(static_cast<void*>(to), 0xFF, 16);  // NaN: there is nothing to be read before the wait
  fibers[threadIdx.x].copies.back().push_back({to, there ? from : nullptr});
}
PMC_DEVICE void close_copies() { fibers[threadIdx.x].copies.emplace_back(); }
template <int kLeft>
PMC_DEVICE void wait_for_copies() {
  auto& groups = fibers[threadIdx.x].copies;
  auto& landed = fibers[threadIdx.x].landed;
  while (groups.size() > kLeft + 1) {
    landed.insert(landed.end(), groups[0].begin(), groups[0].end());
    groups.erase(groups.begin());
  }
}

PMC_DEVICE uint32_t pair_of(BFloat16 first, BFloat16 second) {
  return first.bits | uint32_t{second.bits} << 16;
}

PMC_DEVICE const BFloat16* row_of(const Message& message) {
  const auto* const row = read<const BFloat16*>(message);
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a row of a matrix that is not aligned");
  return row;
}
PMC_DEVICE void load_matrices(uint32_t (&out)[4], const BFloat16* row) {
  const Message* const rows = exchange(row);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const BFloat16* const from = row_of(rows[8 * i + lane / 4]) + lane % 4 * 2;
    out[i] = pair_of(from[0], from[1]);
  }
  wait_at(warps[threadIdx.x / 32], 32);  // no lane writes there before all have read
}
PMC_DEVICE void load_transposed(uint32_t (&out)[4], const BFloat16* row) {
  const Message* const rows = exchange(row);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const Message* const from = rows + 8 * i + lane % 4 * 2;
    out[i] = pair_of(row_of(from[0])[lane / 4], row_of(from[1])[lane / 4]);
  }
  wait_at(warps[threadIdx.x / 32], 32);
}

// Where the numbers of an mma lie: PTX's tables of m16n8k16.
PMC_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b_0, uint32_t b_1) {
  struct Mine {
    uint32_t a[4], b[2];
  };
  const Message* const all = exchange(Mine{{a[0], a[1], a[2], a[3]}, {b_0, b_1}});
  const auto half = [](uint32_t word, unsigned which) {
    float out;
    word = which ? word & 0xFFFF0000u : word << 16;
    std::memcpy(&out, &word, sizeof out);
    return out;
  };
  const unsigned lane = threadIdx.x % 32;
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned column = lane % 4 * 2 + e % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned quad = k % 8 / 2;
      const Mine left = read<Mine>(all[lane / 4 * 4 + quad]), right = read<Mine>(all[column * 4 + quad]);
      c[e] += half(left.a[k / 8 * 2 + e / 2], k % 2) * half(right.b[k / 8], k % 2);
    }
  }
}
}  // namespace pmc

#include "decode_attention_kernel.h"
#include "decode_attention_mma.h"

namespace {

unsigned whole(int64_t n) { return static_cast<unsigned>(n); }

template <typename T>
void append(const pmc::DecodeAttention<T>& a, unsigned seed) {
  launch({whole(a.index.rows), 1, 1}, 256, 0, seed, [&] { pmc::append_kernel<T>(a); });
}

template <typename T, int kDim>
void emulate(const pmc::DecodeAttention<T>& a, unsigned seed) {
  using C = typename pmc::SumOf<T>::Type;
  const pmc::Cuts cuts = pmc::cuts_of(a.heads / a.kv_heads);
  const pmc::Scales<C> scales = pmc::scales_of<C>(a);
  const int64_t units = a.index.rows * cuts.per_row;
  append(a, seed);
  launch({whole(pmc::ceil_div(units, pmc::units_of_block(sizeof(C)))), whole(a.kv_heads), 1},
         pmc::threads_of_block(sizeof(C)), static_cast<size_t>(pmc::shared_bytes(a.dim, sizeof(C))), seed,
         [&] {
           if (cuts.heads == 1) pmc::decode_attention_kernel<T, kDim, 1>(a, cuts, scales);
           if (cuts.heads == 2) pmc::decode_attention_kernel<T, kDim, 2>(a, cuts, scales);
           if (cuts.heads == 3) pmc::decode_attention_kernel<T, kDim, 3>(a, cuts, scales);
         });
}

template <int kDim>
void emulate_mma(const pmc::DecodeAttention<pmc::BFloat16>& a, int64_t tile_rows, unsigned seed) {
  using S = pmc::MmaShape<kDim>;
  const pmc::Tiling tiling = pmc::tiling_of(a.heads / a.kv_heads, tile_rows);
  append(a, seed);
  launch({whole(pmc::ceil_div(a.index.rows, tiling.rows)), whole(a.kv_heads), whole(tiling.parts)},
         S::splits * 32, static_cast<size_t>(S::bytes), seed,
         [&] { pmc::decode_attention_mma_kernel<kDim>(a, tiling, pmc::scales_of<float>(a)); });
}

template <typename T>
pmc::DecodeAttention<T> arguments(const int64_t* n, const double* x) {
  const auto numbers = [&](int i) { return reinterpret_cast<T*>(n[i]); };
  const auto array = [&](int i) { return reinterpret_cast<const int32_t*>(n[i]); };
  return {numbers(0),
          numbers(3),
          numbers(6),
          n[1],
          n[2],
          n[4],
          n[5],
          n[7],
          n[8],
          numbers(9),
          numbers(10),
          numbers(11),
          n[12],
          n[13],
          n[14],
          x[0],
          x[1],
          n[15],
          {array(16), array(17), array(18), array(19), array(20), array(21), array(22), n[23], n[24]}};
}

template <typename T>
void emulate(const pmc::DecodeAttention<T>& a, unsigned seed) {
  if (a.dim > 128) {
    emulate<T, 256>(a, seed);
  } else if (a.dim > 64) {
    emulate<T, 128>(a, seed);
  } else {
    emulate<T, 64>(a, seed);
  }
}

}  // namespace

// n: the arguments of the binding one after another, tuples flat; x: scale and softcap
extern "C" void emulate(int type, const int64_t* n, const double* x, unsigned seed) {
  if (type == 0) emulate<float>(arguments<float>(n, x), seed);
  if (type == 1) emulate<double>(arguments<double>(n, x), seed);
  if (type == 2) emulate<pmc::BFloat16>(arguments<pmc::BFloat16>(n, x), seed);
}

// The same on tensor cores, in bfloat16. tile_rows 0: as many as fit
extern "C" void emulate_mma(const int64_t* n, const double* x, int64_t tile_rows, unsigned seed) {
  const auto a = arguments<pmc::BFloat16>(n, x);
  if (a.dim > 128) {
    emulate_mma<256>(a, tile_rows, seed);
  } else if (a.dim > 64) {
    emulate_mma<128>(a, tile_rows, seed);
  } else {
    emulate_mma<64>(a, tile_rows, seed);
  }
}

// Fills row, first head and number of heads of each unit of so many rows, as far as there are.
extern "C" int64_t units_of(int64_t group, int64_t rows, int64_t* row, int64_t* head, int64_t* heads) {
  const pmc::Cuts cuts = pmc::cuts_of(group);
  for (int64_t n = 0; row && n < rows * cuts.per_row; ++n) {
    const pmc::Unit unit = pmc::unit_of(cuts, static_cast<int32_t>(n));
    row[n] = unit.row;
    head[n] = unit.head;
    heads[n] = unit.heads;
  }
  return rows * cuts.per_row;
}
