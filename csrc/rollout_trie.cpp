#include "rollout_trie.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "checks.h"

namespace pmc {
namespace {

constexpr int64_t kLongest = std::numeric_limits<int32_t>::max();  // of lengths and positions
constexpr int64_t kSpareSlots = 8;  // for each row, so that admitted questions are not preempted soon

}  // namespace

RolloutTrie::RolloutTrie(int64_t capacity, std::vector<int32_t> stops, int64_t match, bool share_prompts)
    : pool_(capacity),
      capacity_(capacity),
      stops_(std::move(stops)),
      match_(match),
      share_prompts_(share_prompts) {
  check_range("match", match, 0, kLongest);
}

int64_t RolloutTrie::add(std::vector<int32_t> prompt, int64_t stream, std::vector<int32_t> samples,
                         int64_t max_new, std::vector<std::vector<int32_t>> drafts,
                         std::vector<int64_t> positions) {
  check_range("max_new", max_new, std::numeric_limits<int64_t>::min(), kLongest);
  check_values("positions", positions.data(), static_cast<int64_t>(positions.size()), kLongest);
  const int64_t longest = static_cast<int64_t>(prompt.size()) + std::max<int64_t>(1, max_new) - 1;
  if (prompt.empty()) throw std::invalid_argument("a prompt has no tokens");
  if (max_new > 0 && longest > capacity_) {
    throw std::invalid_argument("one sample may need " + std::to_string(longest) + " slots of " +
                                std::to_string(capacity_));
  }
  if (positions.empty()) {
    for (size_t i = 0; i < prompt.size(); ++i) positions.push_back(static_cast<int64_t>(i));
  }
  if (positions.size() != prompt.size()) throw std::invalid_argument("a prompt's token has one position");
  const int64_t number = static_cast<int64_t>(questions_.size());
  Question question{std::move(prompt),    stream, max_new, std::move(samples), std::move(drafts),
                    std::move(positions), {}};
  question.results.resize(question.keys.size());
  std::vector<int32_t> all(question.keys.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
  questions_.push_back(std::move(question));
  if (max_new > 0 && !all.empty()) waiting_.push_back({number, std::move(all)});
  return number;
}

bool RolloutTrie::plan(int64_t max_rows, int64_t guess_rows, StepPlan& plan) {
  if (!nodes_.empty()) throw std::logic_error("the last step has not been taken yet");
  if (max_rows < 1) throw std::invalid_argument("max_rows must be at least 1");
  plan = StepPlan();
  const bool roomy = make_room(max_rows);
  int64_t rows = 0;
  for (const Active& active : active_) rows += static_cast<int64_t>(active.rows.size());
  if (roomy) admit(rows, max_rows);
  rows = 0;
  std::vector<int64_t> prompt_rows(active_.size(), 0);
  for (size_t i = 0; i < active_.size(); ++i) {
    Active& active = active_[i];
    const Question& question = questions_[active.work.question];
    const int64_t length = static_cast<int64_t>(question.prompt.size());
    if (active.prefilled < length) {
      prompt_rows[i] = std::min(length - active.prefilled, max_rows - rows);
      rows += prompt_rows[i];
      if (prompt_rows[i] > 0 && active.prefilled + prompt_rows[i] == length) {
        active.rows.push_back({{}, active.work.samples, true});
        nodes_.push_back({static_cast<int64_t>(i),
                          0,
                          static_cast<int64_t>(nodes_.size()),
                          question.prompt.back(),
                          {},
                          {}});
      }
      continue;
    }
    for (size_t r = 0; r < active.rows.size() && rows < max_rows; ++r, ++rows) {
      Row& row = active.rows[r];
      Node node{static_cast<int64_t>(i),
                static_cast<int64_t>(r),
                static_cast<int64_t>(nodes_.size()),
                question.results[row.samples[0]].tokens.back(),
                std::exchange(row.table, {}),
                {}};
      row.planned = true;
      node.table.push_back(pool_.take());
      nodes_.push_back(std::move(node));
    }
  }
  if (rows == 0) return false;
  counters_.steps += 1;
  for (const int64_t count : prompt_rows) counters_.prefill_tokens += count;
  add_guesses(rows, max_rows, guess_rows);
  emit(nodes_, prompt_rows, plan);
  draws_ = plan.draws();
  return true;
}

bool RolloutTrie::plan_ahead(int64_t max_rows, int64_t guess_rows, StepPlan& plan) {
  if (!ahead_.empty()) throw std::logic_error("a step has been planned ahead already");
  if (max_rows < 1) throw std::invalid_argument("max_rows must be at least 1");
  plan = StepPlan();
  if (nodes_.empty() || !waiting_.empty()) return false;  // none: a part of a prompt, or no step at all
  for (const Active& active : active_) {
    if (active.prefilled < static_cast<int64_t>(questions_[active.work.question].prompt.size())) return false;
    for (const Row& row : active.rows) {
      if (!row.samples.empty() && (!row.planned || row.samples.size() > 1)) return false;
    }
  }
  std::vector<int64_t> go_on;  // nodes whose sample is not over: by its length, or by an earlier stop token
  for (size_t n = 0; n < nodes_.size(); ++n) {
    const Node& node = nodes_[n];
    if (node.anchor != static_cast<int64_t>(n)) return false;
    const Active& active = active_[node.active];
    const Question& question = questions_[active.work.question];
    const Row& row = active.rows[node.row];
    if (row.samples.empty()) continue;
    const int64_t drawn = static_cast<int64_t>(question.results[row.samples[0]].tokens.size());
    if (drawn + 1 < question.max_new) go_on.push_back(static_cast<int64_t>(n));
  }
  const int64_t rows = static_cast<int64_t>(go_on.size());
  if (rows == 0 || rows > max_rows || rows > pool_.available()) return false;
  if (match_ > 0 && rows < std::min(max_rows, guess_rows)) return false;
  for (const int64_t n : go_on) {
    Node& before = nodes_[n];
    const int64_t number = static_cast<int64_t>(ahead_.size());
    Node node{before.active, before.row, number, 0, std::exchange(before.table, {}), {}};
    node.table.push_back(pool_.take());
    node.source = before.first_draw;
    ahead_.push_back(std::move(node));
  }
  counters_.steps += 1;
  counters_.ahead_steps += 1;
  emit(ahead_, std::vector<int64_t>(active_.size(), 0), plan);
  return true;
}

// Preempts questions until the rows of the next step have slots; returns whether none had to be.
bool RolloutTrie::make_room(int64_t max_rows) {
  bool roomy = true;
  for (;;) {
    int64_t rows = 0;
    for (const Active& active : active_) rows += static_cast<int64_t>(active.rows.size());
    if (std::min(rows, max_rows) <= pool_.available()) return roomy;
    roomy = false;
    preempt();
  }
}

// The question admitted last starts again later: its draws are functions of their keys, so it draws the same
// samples. If it is the only one, it continues with half of its samples.
void RolloutTrie::preempt() {
  counters_.preemptions += 1;
  Active& last = active_.back();
  if (active_.size() > 1) {
    put_back(last.work.question, last.work.samples);
    release(last);
    active_.pop_back();
    return;
  }
  std::vector<int32_t>& samples = last.work.samples;
  if (samples.size() < 2) throw std::logic_error("one sample alone does not fit the pool");
  const size_t half = samples.size() / 2;
  const std::vector<int32_t> back(samples.begin() + half, samples.end());
  samples.resize(half);
  for (Row& row : last.rows) {
    row.samples.erase(
        std::remove_if(row.samples.begin(), row.samples.end(),
                       [&](int32_t s) { return std::find(back.begin(), back.end(), s) != back.end(); }),
        row.samples.end());
    if (row.samples.empty()) pool_.drop(row.table);
  }
  last.rows.erase(
      std::remove_if(last.rows.begin(), last.rows.end(), [](const Row& row) { return row.samples.empty(); }),
      last.rows.end());
  put_back(last.work.question, back);
}

void RolloutTrie::put_back(int64_t question, std::vector<int32_t> samples) {
  for (const int32_t s : samples) {
    Sample& sample = questions_[question].results[s];
    counters_.sampled_tokens -= static_cast<int64_t>(sample.tokens.size());
    sample = Sample();
  }
  waiting_.push_front({question, std::move(samples)});
}

void RolloutTrie::release(Active& active) {
  for (const Row& row : active.rows) pool_.drop(row.table);
  pool_.drop(active.prompt_slots);
}

void RolloutTrie::admit(int64_t rows, int64_t max_rows) {
  for (const Active& active : active_) {
    rows += static_cast<int64_t>(questions_[active.work.question].prompt.size()) - active.prefilled;
  }
  int64_t histories = 0;
  for (const Active& active : active_)
    histories += std::max<int64_t>(1, static_cast<int64_t>(active.rows.size()));
  while (!waiting_.empty() && rows < max_rows) {
    const Question& question = questions_[waiting_.front().question];
    std::vector<int32_t> slots = shared_slots(question);
    const int64_t shared = static_cast<int64_t>(slots.size());
    const int64_t own = static_cast<int64_t>(question.prompt.size()) - shared;
    const int64_t spare = kSpareSlots * histories;
    if (pool_.available() < own + spare) return;
    pool_.hold(slots);
    for (int64_t i = 0; i < own; ++i) slots.push_back(pool_.take());
    active_.push_back({std::move(waiting_.front()), std::move(slots), shared, {}});
    waiting_.pop_front();
    rows += own;
    ++histories;
  }
}

// The slots of the longest prefix that the prompt shares with an active question's. They are computed in an
// earlier step or in the same one: rows are planned in the order of admission, and all rows of a step write
// before any reads. A prompt's last token is always computed, for its logits.
std::vector<int32_t> RolloutTrie::shared_slots(const Question& question) const {
  const Active* with = nullptr;
  size_t longest = 0;
  if (share_prompts_) {
    for (const Active& active : active_) {
      const Question& other = questions_[active.work.question];
      const size_t most = std::min(question.prompt.size() - 1, other.prompt.size());
      size_t same = 0;
      while (same < most && question.prompt[same] == other.prompt[same] &&
             question.positions[same] == other.positions[same]) {
        ++same;
      }
      if (same > longest) longest = same, with = &active;
    }
  }
  if (with == nullptr) return {};
  return {with->prompt_slots.begin(), with->prompt_slots.begin() + static_cast<std::ptrdiff_t>(longest)};
}

void RolloutTrie::emit(std::vector<Node>& nodes, const std::vector<int64_t>& prompt_rows, StepPlan& plan) {
  plan.cu_rows = plan.cu_prefix = plan.cu_suffix = {0};
  plan.cu_draws = {0};
  std::vector<std::vector<int64_t>> nodes_of(active_.size());
  size_t suffixes = 0;
  for (size_t n = 0; n < nodes.size(); ++n) {
    nodes_of[nodes[n].active].push_back(static_cast<int64_t>(n));
    suffixes += nodes[n].table.size();
  }
  plan.suffix.reserve(suffixes);
  const auto draw = [&](Node& node, int64_t row) {
    const Active& active = active_[node.active];
    const Question& question = questions_[active.work.question];
    node.first_draw = plan.cu_draws.back();
    for (const int32_t s : active.rows[node.row].samples) {
      plan.streams.push_back(question.stream);
      plan.samples.push_back(question.keys[s]);
      plan.draw_positions.push_back(static_cast<int64_t>(node.table.size()));
    }
    node.logits = static_cast<int64_t>(plan.logit_rows.size());
    plan.logit_rows.push_back(row);
    plan.questions.push_back(active.work.question);
    plan.cu_draws.push_back(static_cast<int64_t>(plan.samples.size()));
  };
  for (size_t i = 0; i < active_.size(); ++i) {
    Active& active = active_[i];
    if (prompt_rows[i] == 0 && nodes_of[i].empty()) continue;
    const Question& question = questions_[active.work.question];
    const int64_t length = static_cast<int64_t>(question.prompt.size());
    for (int64_t k = 0; k < prompt_rows[i]; ++k) {
      const int64_t token = active.prefilled + k;
      plan.tokens.push_back(question.prompt[token]);
      plan.positions.push_back(question.positions[token]);
      plan.slots.push_back(active.prompt_slots[token]);
      plan.prefix_len.push_back(static_cast<int32_t>(token + 1));
      plan.cu_suffix.push_back(static_cast<int32_t>(plan.suffix.size()));
    }
    active.prefilled += prompt_rows[i];
    for (const int64_t n : nodes_of[i]) {
      Node& node = nodes[n];
      if (!node.table.empty()) {
        plan.tokens.push_back(node.token);
        if (node.source >= 0) plan.sources.push_back(node.source);
        plan.positions.push_back(question.positions.back() + static_cast<int64_t>(node.table.size()));
        plan.slots.push_back(node.table.back());
        plan.prefix_len.push_back(static_cast<int32_t>(length));
        plan.suffix.insert(plan.suffix.end(), node.table.begin(), node.table.end());
        plan.cu_suffix.push_back(static_cast<int32_t>(plan.suffix.size()));
        counters_.rows += 1;
      }
      draw(node, static_cast<int64_t>(plan.tokens.size()) - 1);
    }
    plan.prefix.insert(plan.prefix.end(), active.prompt_slots.begin(),
                       active.prompt_slots.begin() + active.prefilled);
    plan.cu_prefix.push_back(static_cast<int32_t>(plan.prefix.size()));
    plan.cu_rows.push_back(static_cast<int32_t>(plan.tokens.size()));
  }
}

// Adds a draw to a sample; returns whether the sample is over.
bool RolloutTrie::take(Question& question, int32_t number, int64_t token, double logp, double mass) {
  Sample& sample = question.results[number];
  sample.tokens.push_back(static_cast<int32_t>(token));
  sample.logps.push_back(static_cast<float>(logp));
  sample.mass.push_back(static_cast<float>(mass));
  counters_.sampled_tokens += 1;
  sample.stopped = std::find(stops_.begin(), stops_.end(), token) != stops_.end();
  return sample.stopped || static_cast<int64_t>(sample.tokens.size()) >= question.max_new;
}

void RolloutTrie::finish(Active& active, int32_t number) {
  auto& left = active.work.samples;
  left.erase(std::find(left.begin(), left.end(), number));
}

// Takes the draws of a step after which another was planned ahead: nothing forks, and rows stay in their
// places, since that step counts on them.
void RolloutTrie::advance_chain(const int64_t* tokens, const double* logps, const double* mass) {
  for (Node& node : nodes_) {
    Active& active = active_[node.active];
    Row& row = active.rows[node.row];
    if (row.samples.size() > 1) throw std::logic_error("a step was planned ahead of a row that may fork");
    counters_.ended_rows += row.samples.empty();
    if (!row.samples.empty()) {
      const int64_t d = node.first_draw;
      if (take(questions_[active.work.question], row.samples[0], tokens[d], logps[d], mass[node.logits])) {
        finish(active, row.samples[0]);
        row.samples.clear();
      }
    }
    pool_.drop(node.table);  // empty if the row goes on: then the step ahead has the table
  }
  nodes_ = std::exchange(ahead_, {});
  draws_ = 0;
  for (const Node& node : nodes_) draws_ = std::max(draws_, node.first_draw + 1);
}

void RolloutTrie::advance(const int64_t* tokens, const double* logps, const double* mass) {
  if (!ahead_.empty()) return advance_chain(tokens, logps, mass);
  std::vector<std::vector<Row>> kept(active_.size());  // rows that this step did not compute, then new ones
  for (size_t i = 0; i < active_.size(); ++i) {
    for (Row& row : active_[i].rows) {
      if (!row.planned && !row.samples.empty()) kept[i].push_back(std::move(row));
    }
  }
  for (size_t n = 0; n < nodes_.size(); ++n) {
    if (nodes_[n].anchor != static_cast<int64_t>(n)) continue;
    Active& active = active_[nodes_[n].active];
    Question& question = questions_[active.work.question];
    std::vector<Row>& rows = kept[nodes_[n].active];
    std::vector<std::pair<std::pair<int64_t, int32_t>, size_t>> forks;  // (node, token) -> its row
    const std::vector<int32_t>& samples = active.rows[nodes_[n].row].samples;
    counters_.ended_rows += samples.empty();
    for (size_t rank = 0; rank < samples.size(); ++rank) {
      int64_t at = static_cast<int64_t>(n);
      for (;;) {
        Node& node = nodes_[at];
        const int64_t d = node.first_draw + static_cast<int64_t>(rank);
        const int32_t token = static_cast<int32_t>(tokens[d]);
        if (take(question, samples[rank], token, logps[d], mass[node.logits])) {
          finish(active, samples[rank]);
          break;
        }
        const int64_t next = child(at, token);
        if (next >= 0) {
          at = next;
          nodes_[at].reached = true;
          continue;
        }
        const std::pair<int64_t, int32_t> key{at, token};
        auto fork = std::find_if(forks.begin(), forks.end(), [&](const auto& f) { return f.first == key; });
        if (fork == forks.end()) {
          const bool first = node.heir < 0;
          if (first) node.heir = static_cast<int64_t>(rows.size());
          std::vector<int32_t> table = first ? std::exchange(node.table, {}) : rows[node.heir].table;
          if (!first) pool_.hold(table);
          rows.push_back({std::move(table), {}});
          fork = forks.insert(forks.end(), {key, rows.size() - 1});
        }
        rows[fork->second].samples.push_back(samples[rank]);
        break;
      }
    }
  }
  for (const Node& node : nodes_) {
    counters_.draft_hits += node.reached;
    pool_.drop(node.table);  // empty if a row has taken it over
  }
  nodes_.clear();
  draws_ = 0;
  for (size_t i = 0; i < active_.size(); ++i) active_[i].rows = std::move(kept[i]);
  for (Active& active : active_) {
    if (active.work.samples.empty()) release(active);
  }
  active_.erase(std::remove_if(active_.begin(), active_.end(),
                               [](const Active& active) { return active.work.samples.empty(); }),
                active_.end());
}

}  // namespace pmc
