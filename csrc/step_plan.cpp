#include "step_plan.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "checks.h"

namespace pmc {
namespace {

constexpr int64_t kInt32 = std::numeric_limits<int32_t>::max();

// Writes values, then `fill` up to the field's count.
template <typename T>
T* write(const Field& field, const std::vector<T>& values, T fill, char* out) {
  T* to = reinterpret_cast<T*>(out + field.begin);
  std::copy(values.begin(), values.end(), to);
  std::fill(to + values.size(), to + field.count, fill);
  return to;
}

}  // namespace

std::vector<Field> step_layout(const Bucket& bucket) {
  check_range("rows", bucket.rows, 1, kInt32 / 8);
  check_range("blocks", bucket.blocks, 1, kInt32 / 8);
  check_range("logits", bucket.logits, 1, kInt32 / 8);
  check_range("draws", bucket.draws, 1, kInt32 / 8);
  std::vector<Field> fields = {{"tokens", 0, bucket.rows, 8},          {"positions", 0, bucket.rows, 8},
                               {"logit_rows", 0, bucket.logits, 8},    {"sources", 0, bucket.rows, 8},
                               {"cu_draws", 0, bucket.logits + 1, 8},  {"streams", 0, bucket.draws, 8},
                               {"samples", 0, bucket.draws, 8},        {"draw_positions", 0, bucket.draws, 8},
                               {"slots", 0, bucket.rows, 4},           {"prefix_len", 0, bucket.rows, 4},
                               {"cu_suffix", 0, bucket.rows + 1, 4},   {"cu_rows", 0, bucket.blocks + 1, 4},
                               {"cu_prefix", 0, bucket.blocks + 1, 4}, {"entries", 0, 0, 4}};
  size_t end = 0;
  for (Field& field : fields) {
    field.begin = (end + kAligned - 1) / kAligned * kAligned;
    end = field.begin + static_cast<size_t>(field.count) * field.bytes;
  }
  return fields;
}

size_t padded_bytes(const StepPlan& plan, const Bucket& bucket) {
  const size_t padded = static_cast<size_t>(bucket.rows - plan.rows());
  return step_layout(bucket).back().begin + 4 * (plan.suffix.size() + padded + plan.prefix.size());
}

void pad_step(const StepPlan& plan, const Bucket& bucket, int64_t scratch, char* out) {
  const int64_t real = plan.rows(), padded = bucket.rows - real;
  const bool fits = padded >= 0 && bucket.blocks > plan.blocks() && bucket.logits >= plan.logits();
  if (!fits || bucket.draws < plan.draws()) {
    throw std::invalid_argument("the bucket is too small for the step");
  }
  const int64_t suffixes = static_cast<int64_t>(plan.suffix.size()), prefixes = suffixes + padded;
  check_range("scratch", scratch, 0, kInt32 - padded);
  check_range("entries", prefixes + static_cast<int64_t>(plan.prefix.size()), 0, kInt32);
  const std::vector<Field> fields = step_layout(bucket);
  const Field* field = fields.data();
  write<int64_t>(*field++, plan.tokens, 0, out);
  write<int64_t>(*field++, plan.positions, 0, out);
  write<int64_t>(*field++, plan.logit_rows, bucket.rows - 1, out);
  write<int64_t>(*field++, plan.sources, 0, out);
  int64_t* cu_draws = write<int64_t>(*field++, plan.cu_draws, plan.draws(), out);
  cu_draws[bucket.logits] = bucket.draws;
  write<int64_t>(*field++, plan.streams, 0, out);
  write<int64_t>(*field++, plan.samples, 0, out);
  write<int64_t>(*field++, plan.draw_positions, 0, out);
  int32_t* slots = write<int32_t>(*field++, plan.slots, 0, out);
  write<int32_t>(*field++, plan.prefix_len, 0, out);
  int32_t* cu_suffix = write<int32_t>(*field++, plan.cu_suffix, 0, out);
  for (int64_t r = real; r < bucket.rows; ++r) {
    slots[r] = static_cast<int32_t>(scratch + r - real);
    cu_suffix[r + 1] = static_cast<int32_t>(suffixes + r - real + 1);
  }
  write<int32_t>(*field++, plan.cu_rows, static_cast<int32_t>(bucket.rows), out);
  // suffixes and prefixes are one array, in which both count from its beginning
  const int32_t ends = static_cast<int32_t>(plan.prefix.size());
  const Field& of_prefix = *field++;
  int32_t* cu_prefix = write<int32_t>(of_prefix, plan.cu_prefix, ends, out);
  for (int64_t b = 0; b < of_prefix.count; ++b) cu_prefix[b] += static_cast<int32_t>(prefixes);
  int32_t* entries = reinterpret_cast<int32_t*>(out + field->begin);
  entries = std::copy(plan.suffix.begin(), plan.suffix.end(), entries);
  entries = std::copy(slots + real, slots + bucket.rows, entries);
  std::copy(plan.prefix.begin(), plan.prefix.end(), entries);
}

}  // namespace pmc
