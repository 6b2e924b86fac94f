// What one forward pass of a rollout computes, and its arrays padded to a size of CUDA graphs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pmc {

// Rows of one question lie together: block b is rows cu_rows[b] .. cu_rows[b + 1]. Row r sees the first
// prefix_len[r] slots of its block's prefix (its prompt), then suffix[cu_suffix[r] .. cu_suffix[r + 1]], of
// which the last is its own; a prompt's own slot is the last of the prefix that it sees.
struct StepPlan {
  std::vector<int64_t> tokens, positions;                           // [R]
  std::vector<int32_t> slots, prefix_len, cu_suffix, suffix;        // [R], [R], [R + 1], [...]
  std::vector<int32_t> cu_rows, cu_prefix, prefix;                  // [B + 1], [B + 1], [...]
  std::vector<int64_t> logit_rows;                                  // [L], rows whose logits are drawn from
  std::vector<int64_t> questions;                                   // [L], whose they are
  std::vector<int64_t> cu_draws, streams, samples, draw_positions;  // [L + 1], [D] each
  // [R] of a step that is planned ahead: the draw of the step before that gives a row's token; else empty
  std::vector<int64_t> sources;

  int64_t rows() const { return static_cast<int64_t>(tokens.size()); }
  int64_t blocks() const { return static_cast<int64_t>(cu_rows.size()) - 1; }
  int64_t draws() const { return static_cast<int64_t>(samples.size()); }
  int64_t logits() const { return static_cast<int64_t>(logit_rows.size()); }
};

// A size that steps are padded to.
struct Bucket {
  int64_t rows, blocks, logits, draws;  // blocks: one more than questions, for the padded rows
};

// One array of a padded step: where it begins in the step's memory, its elements and their bytes.
struct Field {
  std::string name;
  size_t begin;
  int64_t count;
  size_t bytes;
};

// The arrays of a padded step in the order in which they lie, each aligned to kAligned bytes. The last,
// `entries`, has suffixes, then prefixes, and as many elements as a step needs; its count is 0 here.
constexpr size_t kAligned = 16;  // Triton compiles another variant for addresses that are not
std::vector<Field> step_layout(const Bucket& bucket);

// Bytes of a step that is padded to a bucket that it fits.
size_t padded_bytes(const StepPlan& plan, const Bucket& bucket);

// Writes a step to `out`, padded. Padded rows form one more question, without a prompt: each writes and sees
// one slot of its own, from `scratch` on. Padded logits are the last row's, padded draws the last logits'.
void pad_step(const StepPlan& plan, const Bucket& bucket, int64_t scratch, char* out);

}  // namespace pmc
