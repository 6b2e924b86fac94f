#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "philox.h"
#include "race.h"
#include "simd.h"

namespace pmc {
namespace {

constexpr int kBins = 256;  // of log-probability, for the threshold search without top_k
constexpr double kBinsPerNat = 8;
constexpr int64_t kBlock = 256;  // logits that are skipped together if none can be kept

template <typename T>
struct Candidate {
  T logit;
  int32_t token;
};

// Likelier first; equal logits in the order of tokens.
template <typename T>
bool before(const Candidate<T>& a, const Candidate<T>& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

struct RowStats {
  double top;           // largest logit
  double sum;           // of exp(logit - top)
  double tempered_sum;  // of exp((logit - top) / temperature)
};

// block_max: the largest of each kBlock logits.
template <typename T>
PMC_INLINE RowStats row_stats(const T* z, int64_t size, double temperature, T* block_max) {
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    block_max[b] = row_max(z + b * kBlock, b + 1 < blocks ? kBlock : size - b * kBlock);
  }
  const T top = row_max(block_max, blocks);
  const double sum = row_sum_exp(z, size, top, T{1});
  const bool same = temperature == 0 || temperature == 1;
  return {top, sum, same ? sum : row_sum_exp(z, size, top, static_cast<T>(1 / temperature))};
}

// Scratch of one thread, kept between rows.
template <typename T>
struct Sampler {
  Sampler(const SampleNucleus<T>& args, Isa processor)
      : a(args),
        isa(processor),
        all((args.top_k == 0 || args.top_k >= args.vocab) && args.top_p >= 1),
        races(all && isa == Isa::kAvx512),
        block_max(static_cast<size_t>((args.vocab + kBlock - 1) / kBlock)) {}

  void row(int64_t r) {
    const T* logits = a.logits + r * a.stride;
    const RowStats stats = dispatch(isa, [&](auto) PMC_ALWAYS_INLINE {
      return row_stats(logits, a.vocab, a.temperature, block_max.data());
    });
    const int64_t begin = a.cu_draws[r], end = a.cu_draws[r + 1];
    if (!(stats.sum > 0 && std::isfinite(stats.sum))) {  // a NaN, a +inf, or nothing but -inf
      for (int64_t d = begin; d < end; ++d) a.tokens[d] = -1, a.logps[d] = std::nan("");
      a.mass[r] = std::nan("");
      return;
    }
    const double top = stats.top, log_sum = top + std::log(stats.sum);
    if (a.temperature == 0) {
      const int64_t first = std::find(logits, logits + a.vocab, static_cast<T>(top)) - logits;
      for (int64_t d = begin; d < end; ++d) a.tokens[d] = first, a.logps[d] = top - log_sum;
      a.mass[r] = 1;
      return;
    }
    if constexpr (std::is_same_v<T, float>) {
      if (races) {
        row_of_all(r, top, log_sum);
        return;
      }
    }
    keep(logits, top);
    double held = 0;
    for (const double w : weights) held += w;
    a.mass[r] = all ? 1.0 : std::min(1.0, held / stats.tempered_sum);
    for (int64_t d = begin; d < end; ++d) {
      const size_t i = race_of_kept(d);
      a.tokens[d] = kept[i].token;
      a.logps[d] = static_cast<double>(kept[i].logit) - log_sum;
    }
  }

 private:
  // The row's draws without top_k and top_p.
  void row_of_all(int64_t r, double top, double log_sum) {
    const T* logits = a.logits + r * a.stride;
    bounds.resize(static_cast<size_t>(a.vocab));
    const int64_t first = std::find(logits, logits + a.vocab, static_cast<T>(top)) - logits;
    const Race row{logits, a.vocab, top, a.temperature, first, bounds.data()};
    race_bounds(row);
    a.mass[r] = 1;
    for (int64_t d = a.cu_draws[r]; d < a.cu_draws[r + 1]; ++d) {
      const uint64_t key = stream_key(a.seed, static_cast<uint64_t>(a.streams[d]));
      a.tokens[d] =
          race(row, key, static_cast<uint32_t>(a.positions[d]), static_cast<uint32_t>(a.samples[d]));
      a.logps[d] = static_cast<double>(logits[a.tokens[d]]) - log_sum;
    }
  }

  // Fills kept, likeliest first, and their weights exp((logit - top) / temperature).
  void keep(const T* logits, double top) {
    if (a.top_k > 0 && a.top_k < a.vocab) {
      largest(logits);
    } else if (a.top_p < 1) {
      likeliest_bins(logits, top);
    } else {
      kept.clear();
      for (int64_t v = 0; v < a.vocab; ++v) kept.push_back({logits[v], static_cast<int32_t>(v)});
    }
    if (a.top_p < 1) std::sort(kept.begin(), kept.end(), before<T>);
    weights.clear();
    double total = 0;
    for (const auto& c : kept) {
      weights.push_back(std::exp((static_cast<double>(c.logit) - top) / a.temperature));
      total += weights.back();
    }
    if (a.top_p >= 1) return;
    // without top_k the bins dropped a tail that still counts in the mass that top_p is a share of
    const double goal = a.top_p * (total + dropped);
    double held = 0;
    size_t size = 0;
    while (size < kept.size() && (size == 0 || held < goal)) held += weights[size++];
    kept.resize(size);
    weights.resize(size);
  }

  // The k largest and all tied with the k-th: a heap of the best so far, whose smallest is the bar.
  void largest(const T* logits) {
    dropped = 0;
    kept.clear();
    const auto smallest_first = [](const Candidate<T>& x, const Candidate<T>& y) { return before(x, y); };
    const size_t k = static_cast<size_t>(a.top_k);
    for (int64_t v = 0; v < a.vocab; ++v) {
      if (v % kBlock == 0 && kept.size() == k && !(block_max[v / kBlock] > kept.front().logit)) {
        v += kBlock - 1;
        continue;
      }
      if (kept.size() == k && !(logits[v] > kept.front().logit)) continue;
      if (kept.size() == k) {
        std::pop_heap(kept.begin(), kept.end(), smallest_first);
        kept.pop_back();
      }
      kept.push_back({logits[v], static_cast<int32_t>(v)});
      std::push_heap(kept.begin(), kept.end(), smallest_first);
    }
    const T bar = kept.front().logit;
    int64_t tied = 0;
    for (const auto& c : kept) tied += c.logit == bar;
    ties.clear();
    for (int64_t v = 0; v < a.vocab; ++v) {
      if (v % kBlock == 0 && block_max[v / kBlock] < bar) {
        v += kBlock - 1;
        continue;
      }
      if (logits[v] == bar) ties.push_back({bar, static_cast<int32_t>(v)});
    }
    if (static_cast<int64_t>(ties.size()) == tied) return;
    kept.erase(
        std::remove_if(kept.begin(), kept.end(), [bar](const Candidate<T>& c) { return c.logit == bar; }),
        kept.end());
    kept.insert(kept.end(), ties.begin(), ties.end());
  }

  // Tokens of the likeliest bins of log-probability that together hold top_p; `dropped` is the rest's.
  void likeliest_bins(const T* logits, double top) {
    double mass[kBins] = {};
    double total = 0;
    for (int64_t v = 0; v < a.vocab; ++v) {
      const double depth = (top - static_cast<double>(logits[v])) / a.temperature;
      const double w = std::exp(-depth);
      mass[bin(depth)] += w;
      total += w;
    }
    int last = 0;
    double held = mass[0];
    // a little more than the goal: the exact cut, by sorted sums, must lie inside
    while (last + 1 < kBins && held < a.top_p * total * (1 + 1e-9)) held += mass[++last];
    kept.clear();
    for (int64_t v = 0; v < a.vocab; ++v) {
      const double depth = (top - static_cast<double>(logits[v])) / a.temperature;
      if (bin(depth) <= last) kept.push_back({logits[v], static_cast<int32_t>(v)});
    }
    dropped = std::max(0.0, total - held);
  }

  static int bin(double depth) { return static_cast<int>(std::min(depth * kBinsPerNat, kBins - 1.0)); }

  // An exponential race: arg-max of w_v / E_v is v with probability w_v / sum of w.
  size_t race_of_kept(int64_t d) const {
    const uint64_t key = stream_key(a.seed, static_cast<uint64_t>(a.streams[d]));
    size_t winner = 0;
    double best = -1;
    for (size_t i = 0; i < kept.size(); ++i) {
      const uint64_t bits =
          philox(key, static_cast<uint32_t>(kept[i].token), static_cast<uint32_t>(a.positions[d]),
                 static_cast<uint32_t>(a.samples[d]), 0);
      const double speed = weights[i] / -std::log(to_uniform(bits));
      if (speed > best || (speed == best && kept[i].token < kept[winner].token)) best = speed, winner = i;
    }
    return winner;
  }

  const SampleNucleus<T>& a;
  const Isa isa;
  const bool all, races;  // no top_k or top_p; and race.h serves
  std::vector<T> block_max;
  std::vector<float> bounds;
  std::vector<Candidate<T>> kept, ties;
  std::vector<double> weights;
  double dropped = 0;
};

template <typename T>
void run(const SampleNucleus<T>& args, Isa isa, int threads) {
  parallel_for(args.rows, threads, [&](int64_t begin, int64_t end) {
    Sampler<T> sampler(args, isa);
    for (int64_t r = begin; r < end; ++r) sampler.row(r);
  });
}

}  // namespace

void sample_nucleus(const SampleNucleus<float>& args, Isa isa, int threads) { run(args, isa, threads); }
void sample_nucleus(const SampleNucleus<double>& args, Isa isa, int threads) { run(args, isa, threads); }

}  // namespace pmc
