// What samples may draw next: rows that RolloutTrie adds to a step, from given drafts and from n-grams.
#include <algorithm>
#include <utility>

#include "rollout_trie.h"

namespace pmc {
namespace {

constexpr int64_t kLongestGuess = 8;

}  // namespace

int64_t RolloutTrie::child(int64_t node, int32_t token) const {
  for (const int64_t c : nodes_[node].children) {
    if (nodes_[c].token == token) return c;
  }
  return -1;
}

int64_t RolloutTrie::add_node(int64_t parent, int32_t token) {
  const Node& above = nodes_[parent];
  Node node{above.active, above.row, above.anchor, token, above.table, {}};
  pool_.hold(node.table);
  node.table.push_back(pool_.take());
  const int64_t number = static_cast<int64_t>(nodes_.size());
  nodes_.push_back(std::move(node));
  nodes_[parent].children.push_back(number);
  counters_.draft_rows += 1;
  return number;
}

// Continues `node` by tokens[begin:], as far as the budget of rows, the pool and the samples' length go.
void RolloutTrie::graft(int64_t node, const std::vector<int32_t>& tokens, size_t begin, int64_t* budget) {
  const int64_t max_new = questions_[active_[nodes_[node].active].work.question].max_new;
  for (size_t i = begin; i < tokens.size(); ++i) {
    const int32_t token = tokens[i];
    if (std::find(stops_.begin(), stops_.end(), token) != stops_.end()) return;
    int64_t next = child(node, token);
    if (next < 0) {
      if (*budget <= 0 || pool_.available() <= 0) return;
      if (static_cast<int64_t>(nodes_[node].table.size()) + 1 >= max_new) return;
      next = add_node(node, token);
      --*budget;
    }
    node = next;
  }
}

void RolloutTrie::add_guesses(int64_t rows, int64_t max_rows, int64_t guess_rows) {
  const size_t anchors = nodes_.size();
  int64_t room = max_rows - rows;
  for (size_t n = 0; n < anchors; ++n) {  // given drafts, with the prompt
    if (!nodes_[n].table.empty()) continue;
    for (const auto& draft : questions_[active_[nodes_[n].active].work.question].drafts) {
      graft(static_cast<int64_t>(n), draft, 0, &room);
    }
  }
  int64_t budget = std::min(room, guess_rows - rows);
  if (match_ == 0 || budget <= 0) return;
  std::vector<int64_t> order;  // those with more samples first
  for (size_t n = 0; n < anchors; ++n) {
    if (!nodes_[n].table.empty()) order.push_back(static_cast<int64_t>(n));
  }
  const auto samples = [&](int64_t n) -> const std::vector<int32_t>& {
    return active_[nodes_[n].active].rows[nodes_[n].row].samples;
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t x, int64_t y) { return samples(x).size() > samples(y).size(); });
  int64_t left = static_cast<int64_t>(order.size());
  for (const int64_t n : order) {
    int64_t share = std::min(kLongestGuess, (budget + left - 1) / left);
    const std::vector<int32_t>* source = nullptr;
    const size_t begin =
        continuation(questions_[active_[nodes_[n].active].work.question], samples(n)[0], &source);
    const int64_t before = share;
    if (source) graft(n, *source, begin, &share);
    budget -= before - share;
    --left;
  }
}

// Finds the longest suffix of a sample's tokens, of at most match_, in a draft, in another sample of the
// question, in its prompt or earlier in the sample itself; returns the index of what follows it there.
size_t RolloutTrie::continuation(const Question& question, int32_t sample,
                                 const std::vector<int32_t>** source) const {
  const std::vector<int32_t>& own = question.results[sample].tokens;
  size_t best = 0, at = 0;
  const auto search = [&](const std::vector<int32_t>& other) {
    for (size_t end = 1; end < other.size(); ++end) {  // other[end] would follow; most does the first time
      size_t same = 0;
      const size_t longest = std::min({own.size(), end, static_cast<size_t>(match_)});
      while (same < longest && other[end - 1 - same] == own[own.size() - 1 - same]) ++same;
      if (same > best) best = same, at = end, *source = &other;
    }
  };
  for (const auto& draft : question.drafts) search(draft);
  for (size_t s = 0; s < question.results.size(); ++s) {
    if (best >= static_cast<size_t>(match_)) break;
    if (static_cast<int32_t>(s) != sample) search(question.results[s].tokens);
  }
  best = std::max<size_t>(best,
                          1);  // a match of one token predicts little here: 1 of 110 such guesses was drawn
  if (best < static_cast<size_t>(match_)) search(question.prompt);
  if (best < static_cast<size_t>(match_)) search(own);
  return at;
}

}  // namespace pmc
