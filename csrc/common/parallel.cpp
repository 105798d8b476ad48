#include "parallel.h"

#include <exception>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

namespace kf {
namespace {

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// GCC's OpenMP entry points, found in a library that is already in the process. LLVM's and Intel's runtimes have
// them too. https://gcc.gnu.org/onlinedocs/libgomp/Implementing-PARALLEL-construct.html
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  std::string name = "std::thread";
};

#if defined(__linux__)
int remember_openmp(dl_phdr_info* info, size_t, void* data) {
  auto* found = static_cast<std::string*>(data);
  const char* path = info->dlpi_name;
  const char* file = path ? std::strrchr(path, '/') : nullptr;
  if (!file || (!std::strstr(file, "libgomp") && !std::strstr(file, "libomp") && !std::strstr(file, "libiomp")))
    return 0;
  if (found->empty() || std::strstr(path, "/torch")) *found = path;
  return 0;
}
#endif

OpenMp find_openmp() {
  OpenMp omp;
#if defined(__linux__)
  std::string path;
  dl_iterate_phdr(remember_openmp, &path);
  if (path.empty()) return omp;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!library) return omp;
  omp.parallel = reinterpret_cast<decltype(omp.parallel)>(dlsym(library, "GOMP_parallel"));
  omp.thread_num = reinterpret_cast<decltype(omp.thread_num)>(dlsym(library, "omp_get_thread_num"));
  omp.num_threads = reinterpret_cast<decltype(omp.num_threads)>(dlsym(library, "omp_get_num_threads"));
  if (omp.parallel && omp.thread_num && omp.num_threads) {
    omp.name = path.substr(path.rfind('/') + 1);
  } else {
    omp.parallel = nullptr;
  }
#endif
  return omp;
}

const OpenMp& openmp() {
  static const OpenMp omp = find_openmp();
  return omp;
}

struct Job {
  void (*body)(void*, int, Team&);
  void* data;
  Team team;
};

void openmp_member(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  const int member = openmp().thread_num();
  job.team.set_size(openmp().num_threads());  // the runtime may give fewer threads than asked for
  job.body(job.data, member, job.team);
}

void run_threads(int threads, Job& job) {
  std::vector<std::thread> members;
  members.reserve(threads - 1);
  std::mutex gate_mutex;
  std::condition_variable gate;
  int state = 0;  // 0 wait, 1 go, -1 leave
  const auto open_gate = [&](int to) {
    {
      std::lock_guard<std::mutex> lock(gate_mutex);
      state = to;
    }
    gate.notify_all();
  };
  job.team.set_size(threads);
  try {
    for (int i = 1; i < threads; ++i) {
      members.emplace_back([&, i] {
        {
          std::unique_lock<std::mutex> lock(gate_mutex);
          gate.wait(lock, [&] { return state != 0; });
          if (state < 0) return;
        }
        job.body(job.data, i, job.team);
      });
    }
    open_gate(1);
  } catch (const std::exception&) {  // no more threads to be had: the caller does it all
    open_gate(-1);
    job.team.set_size(1);
  }
  job.body(job.data, 0, job.team);
  for (auto& member : members) member.join();
}

}  // namespace

void Team::barrier() {
  const int size = this->size();
  if (size == 1) return;
  const int64_t round = round_.load(std::memory_order_acquire);
  if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    waiting_.store(0, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_.store(round + 1, std::memory_order_release);
    }
    wake_.notify_all();
    return;
  }
  for (int spin = 0; spin < 2000; ++spin) {
    if (round_.load(std::memory_order_acquire) != round) return;
    pause_briefly();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != round; });
}

void run_team_raw(int threads, void (*body)(void*, int, Team&), void* data) {
  Job job{body, data, {}};
  if (threads <= 1) {
    body(data, 0, job.team);
  } else if (openmp().parallel) {
    openmp().parallel(openmp_member, &job, static_cast<unsigned>(threads), 0);
  } else {
    run_threads(threads, job);
  }
}

const char* thread_source() { return openmp().name.c_str(); }

}  // namespace kf
