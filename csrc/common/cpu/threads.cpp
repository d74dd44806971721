#include "common/cpu/threads.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace lwft {

// ---- tasks ----

namespace {

std::atomic<ParallelFor> host_parallel_for{nullptr};
std::atomic<ThreadCount> host_thread_count{nullptr};

struct GuardedTasks {
  TaskRange run;
  void* context;
  std::mutex mutex;
  std::exception_ptr first_error;
};

void run_guarded(void* context, int64_t begin, int64_t end) {
  auto& tasks = *static_cast<GuardedTasks*>(context);
  try {
    tasks.run(tasks.context, begin, end);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(tasks.mutex);
    if (!tasks.first_error) tasks.first_error = std::current_exception();
  }
}

}  // namespace

void set_parallel_for(ParallelFor host, ThreadCount threads) {
  host_parallel_for.store(host);
  host_thread_count.store(threads);
}

int64_t thread_count() {
  constexpr int64_t kMany = 64;
  if (host_parallel_for.load() == nullptr) return 1;
  const ThreadCount count = host_thread_count.load();
  return count == nullptr ? kMany : count();
}

void run_tasks(int64_t tasks, TaskRange run, void* context) {
  if (tasks <= 0) return;
  const ParallelFor host = host_parallel_for.load();
  if (host == nullptr || tasks == 1) return run(context, 0, tasks);
  GuardedTasks guarded{run, context, {}, nullptr};
  host(tasks, run_guarded, &guarded);
  if (guarded.first_error) std::rethrow_exception(guarded.first_error);
}

// ---- scratch memory ----

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kFirstBlock = size_t{256} << 10;
constexpr size_t kKeptBytes = size_t{32} << 20;

}  // namespace

// A block of memory with this header at its start. Blocks form a list; those behind the current one are
// empty.
struct alignas(kAlignment) WorkspaceBlock {
  WorkspaceBlock* next;
  size_t capacity, used;  // of the bytes that follow the header

  char* bytes() { return reinterpret_cast<char*>(this + 1); }
};

namespace {

WorkspaceBlock* new_block(size_t capacity) {
  void* memory = ::operator new(sizeof(WorkspaceBlock) + capacity, std::align_val_t{kAlignment});
  auto* block = new (memory) WorkspaceBlock{nullptr, capacity, 0};
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(block->bytes(), capacity);
#endif
  return block;
}

void delete_block(WorkspaceBlock* block) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(block->bytes(), block->capacity);
#endif
  ::operator delete(block, std::align_val_t{kAlignment});
}

struct Workspace {
  WorkspaceBlock* first = nullptr;
  WorkspaceBlock* current = nullptr;
  int open_scopes = 0;

  ~Workspace() { free_from(first); }

  static void free_from(WorkspaceBlock* block) {
    while (block != nullptr) {
      WorkspaceBlock* next = block->next;
      delete_block(block);
      block = next;
    }
  }

  // No scope is open (one that has taken nothing still holds a mark): keep the last block, which is the
  // largest, unless it is too large to keep.
  void shrink() {
    while (first != nullptr && (first->next != nullptr || first->capacity > kKeptBytes)) {
      WorkspaceBlock* next = first->next;
      delete_block(first);
      first = next;
    }
    current = first;
  }
};

thread_local Workspace workspace;

}  // namespace

WorkspaceMark workspace_mark() {
  Workspace& mine = workspace;
  ++mine.open_scopes;
  return {mine.current, mine.current != nullptr ? mine.current->used : 0};
}

void workspace_release(WorkspaceMark mark) {
  Workspace& mine = workspace;
  --mine.open_scopes;
  if (mine.current == nullptr) return;
  // A mark without a block was made before the first one existed.
  WorkspaceBlock* const kept = mark.block != nullptr ? mark.block : mine.first;
  for (WorkspaceBlock* block = kept;; block = block->next) {
    const size_t used = block == kept ? mark.used : 0;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(block->bytes() + used, block->capacity - used);
#endif
    block->used = used;
    if (block == mine.current) break;
  }
  mine.current = kept;
  if (mine.open_scopes == 0) mine.shrink();
}

void* workspace_take(size_t count, size_t element_size) {
  Workspace& mine = workspace;
  constexpr size_t kLargest = SIZE_MAX / 4;
  if (element_size != 0 && count > kLargest / element_size) throw std::bad_alloc();
  const size_t wanted = count * element_size;
  // Under AddressSanitizer a gap follows each piece, so that running over its end is seen.
#if defined(__SANITIZE_ADDRESS__)
  const size_t bytes = (wanted + 2 * kAlignment - 1) / kAlignment * kAlignment;
#else
  const size_t bytes = (wanted + kAlignment - 1) / kAlignment * kAlignment;
#endif
  if (mine.current == nullptr) mine.first = mine.current = new_block(bytes > kFirstBlock ? bytes : kFirstBlock);
  while (mine.current->capacity - mine.current->used < bytes) {
    if (mine.current->next == nullptr) {
      const size_t doubled = 2 * mine.current->capacity;
      mine.current->next = new_block(bytes > doubled ? bytes : doubled);
    }
    mine.current = mine.current->next;
  }
  char* piece = mine.current->bytes() + mine.current->used;
  mine.current->used += bytes;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(piece, wanted);
  std::memset(piece, 0xFF, wanted);
#endif
  return piece;
}

}  // namespace lwft
