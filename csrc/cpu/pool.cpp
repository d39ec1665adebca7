#include "cpu/pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace jz3 {
namespace {

// Every thread begins with its own share of the items, as in the job before, so that what it has written there is still
// in its cache; who is done helps the others.
struct Job {
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  Job(const std::function<void(int64_t)>& item, int64_t count, int threads)
      : item(&item), count(count), shares(size_t(threads)) {
    for (int i = 0; i < threads; ++i) shares[i].next = count * i / threads, shares[i].end = count * (i + 1) / threads;
  }

  const std::function<void(int64_t)>* item;  // the caller's: valid until every item is done
  int64_t count;
  std::vector<Share> shares;
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::exception_ptr error;

  void work(size_t own) {
    for (size_t turn = 0; turn < shares.size(); ++turn) {
      Share& share = shares[(own + turn) % shares.size()];
      for (int64_t i; share.next.load() < share.end && (i = share.next.fetch_add(1)) < share.end;) {
        try {
          (*item)(i);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (!error) error = std::current_exception();
        }
        done.fetch_add(1);
      }
    }
  }
};

constexpr int TURNS = 1000;  // of waiting before sleep, some hundred microseconds

class Pool {
 public:
  // One job at a time; another caller's is done by that caller alone.
  bool run(int64_t count, int threads, const std::function<void(int64_t)>& item) {
    const std::unique_lock<std::mutex> one(busy_, std::try_to_lock);
    if (!one.owns_lock()) return false;
    const auto job = std::make_shared<Job>(item, count, threads);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; workers_ < threads - 1; ++workers_) std::thread([this, own = workers_ + 1] { serve(size_t(own)); }).detach();
      } catch (const std::system_error&) {  // no more are to be had: those there are do it all
      }
      job_ = job;
      number_.fetch_add(1);
    }
    changed_.notify_all();
    job->work(0);
    // What is left is under way on a running thread, as a rule.
    for (int64_t turn = 0; job->done.load() < count; ++turn)
      if (turn > 256) std::this_thread::yield();
    if (job->error) std::rethrow_exception(job->error);
    return true;
  }

 private:
  void serve(size_t own) {
    for (int64_t seen = 0;;) {
      std::shared_ptr<Job> job;
      // The next job often follows at once, and to be woken takes longer than many last.
      for (int turn = 0; turn < TURNS && number_.load() == seen; ++turn) std::this_thread::yield();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return number_.load() != seen; });
        seen = number_.load(), job = job_;
      }
      if (own < job->shares.size()) job->work(own);
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable changed_;
  std::shared_ptr<Job> job_;
  std::atomic<int64_t> number_{0};
  int workers_ = 0;
};

struct OwnPool {
  pid_t owner;
  Pool pool;
};

// Threads don't outlive a fork, nor may they be waited for at exit: a process has a pool of its own, never destroyed.
// Without a lock, which a fork may find closed.
Pool& pool() {
  static std::atomic<OwnPool*> current{nullptr};
  OwnPool* own = current.load();
  while (!own || own->owner != getpid()) {
    OwnPool* const made = new OwnPool{getpid(), {}};
    if (current.compare_exchange_strong(own, made)) return made->pool;
    delete made;
  }
  return own->pool;
}

}  // namespace

void share(int64_t count, int threads, const std::function<void(int64_t)>& item) {
  if (count > 1 && threads > 1 && pool().run(count, threads, item)) return;
  for (int64_t i = 0; i < count; ++i) item(i);
}

}  // namespace jz3
