// Python bindings of the CPU's C++: check arguments, release the GIL, call plain C++.
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <tuple>

#include "checks.h"
#include "decode_attention.h"
#include "nll_rows.h"
#include "rollout_trie.h"
#include "sampling.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

constexpr int64_t kInt32 = std::numeric_limits<int32_t>::max();

// Tensors come as addresses: the caller (pmc_fast.ops) has checked devices, types and shapes. Sizes, strides
// and indices are checked here again, so that a caller's mistake raises an error instead of reading out of
// bounds.
template <typename T>
void nll_rows(uintptr_t logits, int64_t stride, int64_t rows, int64_t vocab, uintptr_t bias,
              double temperature, double softcap, double logit_scale, uintptr_t cu_targets, uintptr_t targets,
              uintptr_t row_scale, uintptr_t logps, int64_t num_targets, bool grad, int isa, int threads) {
  pmc::check_isa(isa);
  pmc::check_threads(threads);
  pmc::check_range("vocab", vocab, 1, kInt32);
  const pmc::Memory written = pmc::memory_of("logits", logits, sizeof(T), rows, vocab, stride);
  const pmc::Memory out = pmc::memory_of("logps", logps, sizeof(T), num_targets);
  const pmc::Memory ends = pmc::memory_of("cu_targets", cu_targets, sizeof(int64_t), rows + 1);
  const pmc::Memory ids = pmc::memory_of("targets", targets, sizeof(int64_t), num_targets);
  const pmc::Memory scales = pmc::memory_of("row_scale", row_scale, sizeof(T), num_targets);
  const pmc::Memory biases = pmc::memory_of("bias", bias, sizeof(T), bias ? vocab : 0);
  pmc::check_apart(written, {out, ends, ids, scales, biases});
  pmc::check_apart(out, {ends, ids, scales, biases});
  const int64_t* offsets = reinterpret_cast<const int64_t*>(cu_targets);
  pmc::check_offsets("cu_targets", offsets, rows + 1, num_targets, false);
  pmc::check_values("targets", reinterpret_cast<const int64_t*>(targets) + offsets[0],
                    offsets[rows] - offsets[0], vocab);
  const pmc::NllRows<T> args{reinterpret_cast<T*>(logits),
                             stride,
                             rows,
                             vocab,
                             reinterpret_cast<const T*>(bias),
                             static_cast<T>(temperature),
                             static_cast<T>(softcap),
                             static_cast<T>(logit_scale),
                             reinterpret_cast<const int64_t*>(cu_targets),
                             reinterpret_cast<const int64_t*>(targets),
                             reinterpret_cast<const T*>(row_scale),
                             reinterpret_cast<T*>(logps),
                             grad};
  py::gil_scoped_release nogil;
  pmc::nll_rows(args, static_cast<pmc::Isa>(isa), threads);
}

template <typename T>
void sample_nucleus(uintptr_t logits, int64_t stride, int64_t rows, int64_t vocab, double temperature,
                    int64_t top_k, double top_p, uint64_t seed, uintptr_t cu_draws, uintptr_t streams,
                    uintptr_t samples, uintptr_t positions, uintptr_t tokens, uintptr_t logps, uintptr_t mass,
                    int64_t draws, int isa, int threads) {
  pmc::check_isa(isa);
  pmc::check_threads(threads);
  pmc::check_range("vocab", vocab, 1, kInt32);
  pmc::check_range("top_k", top_k, 0, std::numeric_limits<int64_t>::max());
  if (!(temperature >= 0 && temperature <= std::numeric_limits<double>::max() && top_p > 0 && top_p <= 1)) {
    throw std::invalid_argument("temperature must be finite and at least 0, top_p above 0 and at most 1");
  }
  const pmc::Memory read = pmc::memory_of("logits", logits, sizeof(T), rows, vocab, stride);
  const pmc::Memory ends = pmc::memory_of("cu_draws", cu_draws, sizeof(int64_t), rows + 1);
  const pmc::Memory of = pmc::memory_of("streams", streams, sizeof(int64_t), draws);
  const pmc::Memory keys = pmc::memory_of("samples", samples, sizeof(int64_t), draws);
  const pmc::Memory at = pmc::memory_of("positions", positions, sizeof(int64_t), draws);
  const pmc::Memory out[] = {pmc::memory_of("tokens", tokens, sizeof(int64_t), draws),
                             pmc::memory_of("logps", logps, sizeof(double), draws),
                             pmc::memory_of("mass", mass, sizeof(double), rows)};
  for (const pmc::Memory& written : out) pmc::check_apart(written, {read, ends, of, keys, at});
  pmc::check_apart(out[0], {out[1], out[2]});
  pmc::check_apart(out[1], {out[2]});
  pmc::check_offsets("cu_draws", reinterpret_cast<const int64_t*>(cu_draws), rows + 1, draws);
  const pmc::SampleNucleus<T> args{reinterpret_cast<const T*>(logits),
                                   stride,
                                   rows,
                                   vocab,
                                   temperature,
                                   top_k,
                                   top_p,
                                   seed,
                                   reinterpret_cast<const int64_t*>(cu_draws),
                                   reinterpret_cast<const int64_t*>(streams),
                                   reinterpret_cast<const int64_t*>(samples),
                                   reinterpret_cast<const int64_t*>(positions),
                                   reinterpret_cast<int64_t*>(tokens),
                                   reinterpret_cast<double*>(logps),
                                   reinterpret_cast<double*>(mass)};
  py::gil_scoped_release nogil;
  pmc::sample_nucleus(args, static_cast<pmc::Isa>(isa), threads);
}

using Strided = std::tuple<uintptr_t, int64_t, int64_t>;  // an address, strides of rows and of heads
using Heads = std::tuple<int64_t, int64_t, int64_t>;      // heads, kv_heads and dim
// StepIndex's arrays in their order, then the numbers of rows and of blocks
using Index =
    std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>;

template <size_t I>
const int32_t* array_at(const Index& index, const char* name, int64_t count) {
  pmc::memory_of(name, std::get<I>(index), sizeof(int32_t), count);
  return reinterpret_cast<const int32_t*>(std::get<I>(index));
}

// Checks that offsets rise and that slots are in the pool, as all reads and writes depend on them.
pmc::StepIndex checked(const Index& index, int64_t pool_slots) {
  const int64_t rows = std::get<7>(index), blocks = std::get<8>(index);
  pmc::check_range("rows", rows, 0, kInt32 - 1);
  pmc::check_range("blocks", blocks, 0, kInt32 - 1);
  pmc::StepIndex i{array_at<0>(index, "slots", rows),
                   array_at<1>(index, "prefix_len", rows),
                   array_at<2>(index, "cu_suffix", rows + 1),
                   nullptr,
                   array_at<4>(index, "cu_rows", blocks + 1),
                   array_at<5>(index, "cu_prefix", blocks + 1),
                   nullptr,
                   rows,
                   blocks};
  pmc::check_offsets("cu_suffix", i.cu_suffix, rows + 1, kInt32);
  // prefixes of a padded step begin behind its suffixes, in one array
  pmc::check_offsets("cu_prefix", i.cu_prefix, blocks + 1, kInt32, false);
  pmc::check_offsets("cu_rows", i.cu_rows, blocks + 1, rows);
  if (i.cu_rows[blocks] != rows) throw std::invalid_argument("cu_rows must end at the number of rows");
  i.suffix = array_at<3>(index, "suffix", i.cu_suffix[rows]);
  i.prefix = array_at<6>(index, "prefix", i.cu_prefix[blocks]);
  pmc::check_values("slots", i.slots, rows, pool_slots);
  pmc::check_values("suffix", i.suffix, i.cu_suffix[rows], pool_slots);
  pmc::check_values("prefix", i.prefix, i.cu_prefix[blocks], pool_slots);
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t most = i.cu_prefix[b + 1] - i.cu_prefix[b];
    for (int64_t r = i.cu_rows[b]; r < i.cu_rows[b + 1]; ++r) {
      const bool sees = i.prefix_len[r] > 0 || i.cu_suffix[r + 1] > i.cu_suffix[r];
      if (i.prefix_len[r] < 0 || i.prefix_len[r] > most || !sees) {
        throw std::invalid_argument("prefix_len must fit the block's prefix, and a row must see a slot");
      }
    }
  }
  return i;
}

template <typename T>
void decode_attention(const Strided& q, const Strided& k, const Strided& v, uintptr_t k_pool,
                      uintptr_t v_pool, uintptr_t out, const Heads& shape, double scale, double softcap,
                      int64_t window, const Index& index, int64_t pool_slots, int isa, int threads) {
  pmc::check_isa(isa);
  pmc::check_threads(threads);
  const auto [heads, kv_heads, dim] = shape;
  pmc::check_range("dim", dim, 1, kInt32);
  pmc::check_range("kv_heads", kv_heads, 1, kInt32);
  pmc::check_range("heads", heads, kv_heads, kInt32);
  if (heads % kv_heads) throw std::invalid_argument("heads must be a multiple of kv_heads");
  pmc::check_finite("scale", scale);
  pmc::check_finite("softcap", softcap);
  pmc::check_range("window", window, 0, kInt32);
  pmc::check_range("pool_slots", pool_slots, 0, kInt32);
  const pmc::StepIndex step = checked(index, pool_slots);
  const auto of = [&, d = dim](const char* name, const Strided& t, int64_t of_heads) {
    return pmc::memory_of(name, std::get<0>(t), sizeof(T), step.rows, of_heads, d, std::get<1>(t),
                          std::get<2>(t));
  };
  const pmc::Memory queries = of("q", q, heads), keys = of("k", k, kv_heads), values = of("v", v, kv_heads);
  const int64_t slot = pmc::product_of("the pool", {kv_heads, dim});
  const pmc::Memory key_pool = pmc::memory_of("k_pool", k_pool, sizeof(T), pool_slots, slot, slot);
  const pmc::Memory value_pool = pmc::memory_of("v_pool", v_pool, sizeof(T), pool_slots, slot, slot);
  const int64_t wide = pmc::product_of("out", {heads, dim});
  const pmc::Memory written = pmc::memory_of("out", out, sizeof(T), step.rows, wide, wide);
  pmc::check_apart(written, {queries, keys, values, key_pool, value_pool});
  pmc::check_apart(key_pool, {queries, keys, values, value_pool});
  pmc::check_apart(value_pool, {queries, keys, values});
  const int32_t* arrays[] = {step.slots,   step.prefix_len, step.cu_suffix, step.suffix,
                             step.cu_rows, step.cu_prefix,  step.prefix};
  const int64_t counts[] = {step.rows,
                            step.rows,
                            step.rows + 1,
                            step.cu_suffix[step.rows],
                            step.blocks + 1,
                            step.blocks + 1,
                            step.cu_prefix[step.blocks]};
  for (int i = 0; i < 7; ++i) {
    const pmc::Memory part =
        pmc::memory_of("the index", reinterpret_cast<uintptr_t>(arrays[i]), 4, counts[i]);
    for (const pmc::Memory& changed : {written, key_pool, value_pool}) pmc::check_apart(changed, {part});
  }
  const auto address = [](const Strided& t) { return reinterpret_cast<T*>(std::get<0>(t)); };
  const pmc::DecodeAttention<T> args{address(q),
                                     address(k),
                                     address(v),
                                     std::get<1>(q),
                                     std::get<2>(q),
                                     std::get<1>(k),
                                     std::get<2>(k),
                                     std::get<1>(v),
                                     std::get<2>(v),
                                     reinterpret_cast<T*>(k_pool),
                                     reinterpret_cast<T*>(v_pool),
                                     reinterpret_cast<T*>(out),
                                     heads,
                                     kv_heads,
                                     dim,
                                     scale,
                                     softcap,
                                     window,
                                     step};
  py::gil_scoped_release nogil;
  pmc::decode_attention(args, static_cast<pmc::Isa>(isa), threads);
}

template <typename T>
Array<T> array_of(const std::vector<T>& values) {
  return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// One of a plan's arrays, in the plan's own memory.
py::object array(py::object self, const std::string& name) {
  const pmc::StepPlan& p = self.cast<const pmc::StepPlan&>();
  const auto view = [&](const auto& values) -> py::object {
    using T = typename std::decay_t<decltype(values)>::value_type;
    return Array<T>(static_cast<py::ssize_t>(values.size()), values.data(), self);
  };
  const std::pair<const char*, const std::vector<int64_t>*> wide[] = {
      {"tokens", &p.tokens},       {"positions", &p.positions}, {"logit_rows", &p.logit_rows},
      {"questions", &p.questions}, {"cu_draws", &p.cu_draws},   {"streams", &p.streams},
      {"samples", &p.samples},     {"sources", &p.sources},     {"draw_positions", &p.draw_positions},
  };
  const std::pair<const char*, const std::vector<int32_t>*> narrow[] = {
      {"slots", &p.slots},   {"prefix_len", &p.prefix_len}, {"cu_suffix", &p.cu_suffix},
      {"suffix", &p.suffix}, {"cu_rows", &p.cu_rows},       {"cu_prefix", &p.cu_prefix},
      {"prefix", &p.prefix},
  };
  for (const auto& [known, values] : wide) {
    if (name == known) return view(*values);
  }
  for (const auto& [known, values] : narrow) {
    if (name == known) return view(*values);
  }
  throw py::key_error(name);
}

// The arrays of a step padded to a bucket: name -> where it begins, its elements, their bytes.
py::dict step_layout(int64_t rows, int64_t blocks, int64_t logits, int64_t draws) {
  py::dict out;
  for (const pmc::Field& field : pmc::step_layout({rows, blocks, logits, draws})) {
    out[py::str(field.name)] = py::make_tuple(field.begin, field.count, field.bytes);
  }
  return out;
}

void pad_step(const pmc::StepPlan& plan, int64_t rows, int64_t blocks, int64_t logits, int64_t draws,
              int64_t scratch, Array<uint8_t>& out) {
  const pmc::Bucket bucket{rows, blocks, logits, draws};
  if (rows < plan.rows()) throw std::invalid_argument("the bucket is too small for the step");
  const size_t needed = pmc::padded_bytes(plan, bucket);
  char* to = reinterpret_cast<char*>(out.mutable_data());
  if (static_cast<size_t>(out.size()) < needed || reinterpret_cast<uintptr_t>(to) % sizeof(int64_t)) {
    throw std::invalid_argument("the step needs " + std::to_string(needed) + " aligned bytes");
  }
  pmc::pad_step(plan, bucket, scratch, to);
}

// The next step, or None: when all is done, or where draws decide which step it is.
template <bool (pmc::RolloutTrie::*Plan)(int64_t, int64_t, pmc::StepPlan&)>
py::object plan(pmc::RolloutTrie& trie, int64_t max_rows, int64_t guess_rows) {
  pmc::check_range("max_rows", max_rows, 1, kInt32);
  pmc::check_range("guess_rows", guess_rows, 0, kInt32);
  pmc::StepPlan made;
  if (!(trie.*Plan)(max_rows, guess_rows, made)) return py::none();
  return py::cast(std::move(made));
}

void advance(pmc::RolloutTrie& trie, const Array<int64_t>& tokens, const Array<double>& logps,
             const Array<double>& mass) {
  if (tokens.size() != trie.planned_draws() || logps.size() != tokens.size() ||
      mass.size() != trie.planned_logits()) {
    throw std::invalid_argument("advance takes what the last plan asked for");
  }
  pmc::check_values("tokens", tokens.data(), tokens.size(), kInt32 + 1);
  trie.advance(tokens.data(), logps.data(), mass.data());
}

py::dict counters(const pmc::RolloutTrie& trie) {
  const pmc::Counters& c = trie.counters();
  py::dict out;
  out["rows"] = c.rows;
  out["sampled_tokens"] = c.sampled_tokens;
  out["prefill_tokens"] = c.prefill_tokens;
  out["steps"] = c.steps;
  out["peak_slots"] = trie.pool().peak();
  out["draft_rows"] = c.draft_rows;
  out["draft_hits"] = c.draft_hits;
  out["preemptions"] = c.preemptions;
  out["ahead_steps"] = c.ahead_steps;
  out["ended_rows"] = c.ended_rows;
  return out;
}

// Of each sample: tokens, logps, nucleus masses, and whether a stop token ended it.
py::list results(const pmc::RolloutTrie& trie, int64_t question) {
  pmc::check_range("question", question, 0, trie.questions() - 1);
  py::list out;
  for (const pmc::Sample& s : trie.results(question)) {
    out.append(py::make_tuple(s.tokens, array_of(s.logps), array_of(s.mass), s.stopped));
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "pmc_fast's C++ for the CPU";
  m.def("best_isa", [] { return static_cast<int>(pmc::best_isa()); });
  pmc::bind_layers(m);
  m.def("nll_rows_f32", &nll_rows<float>);
  m.def("nll_rows_f64", &nll_rows<double>);
  m.def("sample_nucleus_f32", &sample_nucleus<float>);
  m.def("sample_nucleus_f64", &sample_nucleus<double>);
  m.def("decode_attention_f32", &decode_attention<float>);
  m.def("decode_attention_f64", &decode_attention<double>);
  m.def("decode_attention_bf16", &decode_attention<pmc::BFloat16>);
  m.def("step_layout", &step_layout, py::arg("rows"), py::arg("blocks"), py::arg("logits"), py::arg("draws"));
  py::class_<pmc::StepPlan>(m, "StepPlan")
      .def("__getitem__", &array)
      .def_property_readonly("rows", &pmc::StepPlan::rows)
      .def_property_readonly("blocks", &pmc::StepPlan::blocks)
      .def_property_readonly("draws", &pmc::StepPlan::draws)
      .def_property_readonly("logits", &pmc::StepPlan::logits)
      .def(
          "padded_bytes",
          [](const pmc::StepPlan& p, int64_t rows, int64_t blocks, int64_t logits, int64_t draws) {
            pmc::check_range("rows", rows, p.rows(), kInt32);
            return pmc::padded_bytes(p, {rows, blocks, logits, draws});
          },
          py::arg("rows"), py::arg("blocks"), py::arg("logits"), py::arg("draws"))
      .def("pad", &pad_step, py::arg("rows"), py::arg("blocks"), py::arg("logits"), py::arg("draws"),
           py::arg("scratch"), py::arg("out").noconvert());
  py::class_<pmc::RolloutTrie>(m, "RolloutTrie")
      .def(py::init<int64_t, std::vector<int32_t>, int64_t, bool>(), py::arg("capacity"), py::arg("stops"),
           py::arg("match"), py::arg("share_prompts") = true)
      .def("add", &pmc::RolloutTrie::add, py::arg("prompt"), py::arg("stream"), py::arg("samples"),
           py::arg("max_new"), py::arg("drafts"), py::arg("positions") = std::vector<int64_t>())
      .def("plan", &plan<&pmc::RolloutTrie::plan>, py::arg("max_rows"), py::arg("guess_rows"))
      .def("plan_ahead", &plan<&pmc::RolloutTrie::plan_ahead>, py::arg("max_rows"), py::arg("guess_rows"))
      .def("advance", &advance, py::arg("tokens").noconvert(), py::arg("logps").noconvert(),
           py::arg("mass").noconvert())
      .def("results", &results, py::arg("question"))
      .def("counters", &counters)
      .def_property_readonly("span", [](const pmc::RolloutTrie& t) { return t.pool().span(); })
      .def_property_readonly("in_use", [](const pmc::RolloutTrie& t) { return t.pool().in_use(); });
}
