// Rows sorted by group, each group a job of its own, and the threads that share the jobs.
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

#include "../common/aligned_buffer.h"
#include "../common/error.h"
#include "../common/parallel.h"
#include "../common/tensor_view.h"
#include "by_rows.h"

namespace kf::cpu {

// Where the rows of each group begin: int64 [groups + 1], rising from 0 to `rows`.
inline const int64_t* check_offsets(const TensorView& offsets, int64_t groups, int64_t rows) {
  check_vector(offsets, "offsets", groups + 1, DType::i64);
  const int64_t* begin = static_cast<const int64_t*>(offsets.data);
  require(begin[0] == 0 && begin[groups] == rows, "offsets must rise from 0 to the number of rows");
  for (int64_t g = 0; g < groups; ++g) require(begin[g] <= begin[g + 1], "offsets must not fall");
  return begin;
}

constexpr size_t ALONE_BYTES = 4 << 20;  // of packed operands that a thread may have for itself

// Jobs by how they are done. It depends on the number of threads, so it must not change a result.
struct Division {
  int members;
  std::vector<size_t> together;  // by all threads, one job after another
  std::vector<size_t> alone;     // by the thread that takes it
  size_t together_bytes = 0, alone_bytes = 0;

  // A job has `work`, `packed_bytes` and `tasks`, into which it can be divided. Threads get `grain` units of work each.
  template <class Job>
  Division(const std::vector<Job>& jobs, double grain, int threads) {
    double work = 0;
    int64_t tasks = 0;
    for (const Job& job : jobs) {
      work += job.work;
      tasks += job.tasks;
    }
    members = static_cast<int>(std::min<int64_t>(worthwhile_threads(work, grain, threads), tasks));
    for (size_t i = 0; i < jobs.size(); ++i) {
      const bool fair = members == 1 || 2 * members * jobs[i].work <= work;
      if (fair && jobs[i].packed_bytes <= ALONE_BYTES) {
        alone.push_back(i);
        alone_bytes = std::max(alone_bytes, jobs[i].packed_bytes);
      } else {
        together.push_back(i);
        together_bytes = std::max(together_bytes, jobs[i].packed_bytes);
      }
    }
  }
};

// Calls together(job, memory, member, team) of every member and alone(job, memory, member) of one, the memory being as
// large as the job's packed operands; first enter() and last leave() on every member.
template <class Job, class Enter, class Together, class Alone, class Leave>
void run_jobs(const std::vector<Job>& jobs, const Division& division, Enter&& enter, Together&& together, Alone&& alone,
              Leave&& leave) {
  AlignedBuffer shared(division.together_bytes), each(division.members * division.alone_bytes);
  Counter next;
  run_team(division.members, [&](int member, Team& team) {
    enter();
    for (size_t i : division.together) together(jobs[i], shared.get<char>(), member, team);
    char* memory = each.get<char>() + member * division.alone_bytes;
    const int64_t count = static_cast<int64_t>(division.alone.size());
    for (int64_t t; (t = next.take()) < count;) alone(jobs[division.alone[t]], memory, member);
    leave();
  });
}

}  // namespace kf::cpu
