// What Python sees of the CPU's C++: checks shapes, releases the GIL, calls plain C++.
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "decode_attention.h"
#include "kv_pool.h"
#include "nll_rows.h"
#include "rollout_trie.h"
#include "rouge.h"
#include "sampling.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// offsets must start at 0, never fall and end at size: the C++ trusts them with its reads.
void check_offsets(const Array<int64_t>& offsets, int64_t size, const char* name) {
  const int64_t* o = offsets.data();
  bool good = offsets.ndim() == 1 && offsets.size() >= 1 && o[0] == 0;
  for (int64_t i = 1; good && i < offsets.size(); ++i) good = o[i] >= o[i - 1];
  if (!good || o[offsets.size() - 1] != size) {
    throw std::invalid_argument(std::string(name) + " must rise from 0 to the number of ids");
  }
}

Array<double> rouge_l_recall(const Array<int32_t>& references, const Array<int64_t>& reference_offsets,
                             const Array<int32_t>& candidates, const Array<int64_t>& candidate_offsets) {
  check_offsets(reference_offsets, references.size(), "reference_offsets");
  check_offsets(candidate_offsets, candidates.size(), "candidate_offsets");
  const int64_t questions = reference_offsets.size() - 1;
  const int64_t texts = candidate_offsets.size() - 1;
  if (questions == 0 ? texts != 0 : texts % questions != 0) {
    throw std::invalid_argument("every reference needs the same number of candidates");
  }
  const int64_t samples = questions == 0 ? 0 : texts / questions;
  Array<double> recall({questions, samples});
  double* out = recall.mutable_data();
  {
    py::gil_scoped_release nogil;
    pmc::rouge_l_recall(references.data(), reference_offsets.data(), candidates.data(),
                        candidate_offsets.data(), questions, samples, out);
  }
  return recall;
}

// Tensors come as addresses: the caller (pmc_fast.ops) has checked devices, types, shapes and targets.
template <typename T>
void nll_rows(uintptr_t logits, int64_t stride, int64_t rows, int64_t vocab, uintptr_t bias,
              double temperature, double softcap, double logit_scale, uintptr_t cu_targets, uintptr_t targets,
              uintptr_t row_scale, uintptr_t logps, bool grad, int isa, int threads) {
  pmc::check_isa(isa);
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
                    int isa, int threads) {
  pmc::check_isa(isa);
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

template <typename T>
void decode_attention(py::tuple q, py::tuple k, py::tuple v, uintptr_t k_pool, uintptr_t v_pool,
                      uintptr_t out, py::tuple shape, double scale, double softcap, int64_t window,
                      py::tuple index, int isa, int threads) {
  pmc::check_isa(isa);
  // an address with two strides each; heads, kv_heads and dim; the index's arrays, rows and blocks
  const auto address = [](const py::tuple& t) { return reinterpret_cast<T*>(t[0].cast<uintptr_t>()); };
  const auto number = [](const py::tuple& t, int i) { return t[i].cast<int64_t>(); };
  const auto array = [&](int i) { return reinterpret_cast<const int32_t*>(index[i].cast<uintptr_t>()); };
  const pmc::DecodeAttention<T> args{address(q),
                                     address(k),
                                     address(v),
                                     number(q, 1),
                                     number(q, 2),
                                     number(k, 1),
                                     number(k, 2),
                                     number(v, 1),
                                     number(v, 2),
                                     reinterpret_cast<T*>(k_pool),
                                     reinterpret_cast<T*>(v_pool),
                                     reinterpret_cast<T*>(out),
                                     number(shape, 0),
                                     number(shape, 1),
                                     number(shape, 2),
                                     scale,
                                     softcap,
                                     window,
                                     {array(0), array(1), array(2), array(3), array(4), array(5), array(6),
                                      number(index, 7), number(index, 8)}};
  py::gil_scoped_release nogil;
  pmc::decode_attention(args, static_cast<pmc::Isa>(isa), threads);
}

template <typename T>
Array<T> array_of(const std::vector<T>& values) {
  return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// The next step's arrays by name, or None when all is done.
py::object plan(pmc::RolloutTrie& trie, int64_t max_rows, int64_t guess_rows) {
  pmc::StepPlan p;
  if (!trie.plan(max_rows, guess_rows, p)) return py::none();
  py::dict out;
  out["tokens"] = array_of(p.tokens);
  out["positions"] = array_of(p.positions);
  out["slots"] = array_of(p.slots);
  out["prefix_len"] = array_of(p.prefix_len);
  out["cu_suffix"] = array_of(p.cu_suffix);
  out["suffix"] = array_of(p.suffix);
  out["cu_rows"] = array_of(p.cu_rows);
  out["cu_prefix"] = array_of(p.cu_prefix);
  out["prefix"] = array_of(p.prefix);
  out["logit_rows"] = array_of(p.logit_rows);
  out["cu_draws"] = array_of(p.cu_draws);
  out["streams"] = array_of(p.streams);
  out["samples"] = array_of(p.samples);
  out["draw_positions"] = array_of(p.draw_positions);
  return out;
}

void advance(pmc::RolloutTrie& trie, const Array<int64_t>& tokens, const Array<double>& logps,
             const Array<double>& mass) {
  if (tokens.size() != trie.planned_draws() || logps.size() != tokens.size() ||
      mass.size() != trie.planned_logits()) {
    throw std::invalid_argument("advance takes what the last plan asked for");
  }
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
  return out;
}

// Of each sample: tokens, logps, nucleus masses, and whether a stop token ended it.
py::list results(const pmc::RolloutTrie& trie, int64_t question) {
  py::list out;
  for (const pmc::Sample& s : trie.results(question)) {
    out.append(py::make_tuple(s.tokens, array_of(s.logps), array_of(s.mass), s.stopped));
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "pmc_fast's C++ for the CPU";
  m.def("rouge_l_recall", &rouge_l_recall, py::arg("references").noconvert(),
        py::arg("reference_offsets").noconvert(), py::arg("candidates").noconvert(),
        py::arg("candidate_offsets").noconvert());
  m.def("best_isa", [] { return static_cast<int>(pmc::best_isa()); });
  pmc::bind_layers(m);
  m.def("nll_rows_f32", &nll_rows<float>);
  m.def("nll_rows_f64", &nll_rows<double>);
  m.def("sample_nucleus_f32", &sample_nucleus<float>);
  m.def("sample_nucleus_f64", &sample_nucleus<double>);
  m.def("decode_attention_f32", &decode_attention<float>);
  m.def("decode_attention_f64", &decode_attention<double>);
  m.def("decode_attention_bf16", &decode_attention<pmc::BFloat16>);
  py::class_<pmc::KvPool>(m, "KvPool")
      .def(py::init<int64_t>())
      .def("take", &pmc::KvPool::take)
      .def("hold", &pmc::KvPool::hold)
      .def("drop", &pmc::KvPool::drop)
      .def("holders", &pmc::KvPool::holders)
      .def_property_readonly("available", &pmc::KvPool::available)
      .def_property_readonly("in_use", &pmc::KvPool::in_use)
      .def_property_readonly("peak", &pmc::KvPool::peak)
      .def_property_readonly("span", &pmc::KvPool::span);
  py::class_<pmc::RolloutTrie>(m, "RolloutTrie")
      .def(py::init<int64_t, std::vector<int32_t>, int64_t>(), py::arg("capacity"), py::arg("stops"),
           py::arg("match"))
      .def("add", &pmc::RolloutTrie::add, py::arg("prompt"), py::arg("stream"), py::arg("samples"),
           py::arg("max_new"), py::arg("drafts"), py::arg("positions") = std::vector<int64_t>())
      .def("plan", &plan, py::arg("max_rows"), py::arg("guess_rows"))
      .def("advance", &advance, py::arg("tokens").noconvert(), py::arg("logps").noconvert(),
           py::arg("mass").noconvert())
      .def("results", &results, py::arg("question"))
      .def("counters", &counters)
      .def_property_readonly("span", [](const pmc::RolloutTrie& t) { return t.pool().span(); })
      .def_property_readonly("in_use", [](const pmc::RolloutTrie& t) { return t.pool().in_use(); });
}
