// Decides, step by step, which token histories a rollout computes and where their keys and values lie.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "kv_pool.h"
#include "step_plan.h"

namespace pmc {

struct Sample {
  std::vector<int32_t> tokens;
  std::vector<float> logps, mass;
  bool stopped = false;  // by a stop token; otherwise by length
};

struct Counters {
  int64_t rows = 0, draft_rows = 0, draft_hits = 0, prefill_tokens = 0, steps = 0, sampled_tokens = 0,
          preemptions = 0, ahead_steps = 0,
          ended_rows = 0;  // ended_rows: computed ahead, of samples that had ended
};

// Prompts share the slots of their common prefix, which is computed once. Samples of
// one question that have drawn the same tokens are one row. After its distribution is known each sample
// draws; those that drew the same token are one row of the next step. Drafts are guesses of what will be
// drawn, computed in the same step as the row they continue; those that no sample draws are dropped.
class RolloutTrie {
 public:
  // capacity: slots of the pool; match: longest suffix that a guess is looked up by, 0 for no guesses
  RolloutTrie(int64_t capacity, std::vector<int32_t> stops, int64_t match, bool share_prompts);

  // Queues a question; returns its number. Its samples come out in the order of `samples`. `positions` are
  // its prompt's, where they are not 0, 1, ...; answers go on from the last.
  int64_t add(std::vector<int32_t> prompt, int64_t stream, std::vector<int32_t> samples, int64_t max_new,
              std::vector<std::vector<int32_t>> drafts, std::vector<int64_t> positions = {});

  // Fills `plan` with at most max_rows rows, guesses only as far as guess_rows; false when all is done.
  bool plan(int64_t max_rows, int64_t guess_rows, StepPlan& plan);

  // Fills `plan` with the step after the one that was planned last, before its draws are known: its tokens
  // are these draws (`sources`). False where they decide which rows it has: where samples share a row, rows
  // or questions wait, guesses were or would be made, or the pool is short. A row that a stop token ends in
  // the step before is computed in vain; it holds its slots until the draws of the step ahead are taken, too.
  bool plan_ahead(int64_t max_rows, int64_t guess_rows, StepPlan& plan);

  // Takes the draws of the first step whose draws were not yet taken: tokens and logps [D], mass [L].
  void advance(const int64_t* tokens, const double* logps, const double* mass);

  const std::vector<Sample>& results(int64_t question) const { return questions_.at(question).results; }
  int64_t questions() const { return static_cast<int64_t>(questions_.size()); }
  int64_t planned_draws() const { return draws_; }
  int64_t planned_logits() const { return static_cast<int64_t>(nodes_.size()); }
  const KvPool& pool() const { return pool_; }
  const Counters& counters() const { return counters_; }

 private:
  struct Question {
    std::vector<int32_t> prompt;
    int64_t stream, max_new;
    std::vector<int32_t> keys;  // of each sample, for its random numbers
    std::vector<std::vector<int32_t>> drafts;
    std::vector<int64_t> positions;  // of the prompt
    std::vector<Sample> results;
  };
  // One history that some samples share: its slots after the prompt, of which it holds each; its last token
  // gets its own when it is computed. While it is in a step, its node has the table.
  struct Row {
    std::vector<int32_t> table, samples;  // no samples: it has ended, and is in a step that was planned ahead
    bool planned = false;                 // in the step that was planned last
  };
  struct Work {  // some samples of one question
    int64_t question;
    std::vector<int32_t> samples;  // that are not done
  };
  struct Active {
    Work work;
    std::vector<int32_t> prompt_slots;
    int64_t prefilled = 0;
    std::vector<Row> rows;
  };
  struct Node {           // of a step; parents come before their children
    int64_t active, row;  // row: of Active::rows, of the samples that are here or may come here
    int64_t anchor;       // the node where those samples are
    int32_t token;
    std::vector<int32_t>
        table;  // all slots after the prompt, its own the last; empty: the prompt's last token
    std::vector<int64_t> children;
    int64_t logits = 0, first_draw = 0;  // where its distribution and its draws are in the plan
    bool reached = false;                // a guess that was drawn
    int64_t heir = -1;                   // the new row that has taken over its table
    int64_t source = -1;                 // the draw of the step before that is its token
  };

  bool make_room(int64_t max_rows);
  void preempt();
  void release(Active& active);
  void put_back(int64_t question, std::vector<int32_t> samples);
  void admit(int64_t rows, int64_t max_rows);
  std::vector<int32_t> shared_slots(const Question& question) const;
  int64_t child(int64_t node, int32_t token) const;
  int64_t add_node(int64_t parent, int32_t token);
  void add_guesses(int64_t rows, int64_t max_rows, int64_t guess_rows);
  void graft(int64_t node, const std::vector<int32_t>& tokens, size_t begin, int64_t* budget);
  size_t continuation(const Question& question, int32_t sample, const std::vector<int32_t>** source) const;
  void emit(std::vector<Node>& nodes, const std::vector<int64_t>& prompt_rows, StepPlan& plan);
  bool take(Question& question, int32_t number, int64_t token, double logp, double mass);
  void finish(Active& active, int32_t number);
  void advance_chain(const int64_t* tokens, const double* logps, const double* mass);

  KvPool pool_;
  const int64_t capacity_;
  const std::vector<int32_t> stops_;
  const int64_t match_;
  const bool share_prompts_;
  std::vector<Question> questions_;
  std::deque<Work> waiting_;
  std::vector<Active> active_;  // in the order of admission
  std::vector<Node> nodes_;     // of the first step whose draws were not yet taken
  std::vector<Node> ahead_;     // of the step after it, if it was planned ahead
  int64_t draws_ = 0;           // of nodes_
  Counters counters_;
};

}  // namespace pmc
