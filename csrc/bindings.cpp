// The one file that knows pybind11: checks shapes, releases the GIL, calls plain C++.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "nll_rows.h"
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

void check_isa(int isa) {
  if (isa < 0 || isa > static_cast<int>(pmc::best_isa())) {
    throw std::invalid_argument("isa " + std::to_string(isa) + " is not to be had on this processor");
  }
}

// Tensors come as addresses: the caller (pmc_fast.ops) has checked devices, types, shapes and targets.
template <typename T>
void nll_rows(uintptr_t logits, int64_t stride, int64_t rows, int64_t vocab, uintptr_t bias,
              double temperature, double softcap, double logit_scale, uintptr_t cu_targets, uintptr_t targets,
              uintptr_t row_scale, uintptr_t logps, bool grad, int isa, int threads) {
  check_isa(isa);
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
  check_isa(isa);
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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "pmc_fast's C++ for the CPU";
  m.def("rouge_l_recall", &rouge_l_recall, py::arg("references").noconvert(),
        py::arg("reference_offsets").noconvert(), py::arg("candidates").noconvert(),
        py::arg("candidate_offsets").noconvert());
  m.def("best_isa", [] { return static_cast<int>(pmc::best_isa()); });
  m.def("nll_rows_f32", &nll_rows<float>);
  m.def("nll_rows_f64", &nll_rows<double>);
  m.def("sample_nucleus_f32", &sample_nucleus<float>);
  m.def("sample_nucleus_f64", &sample_nucleus<double>);
}
