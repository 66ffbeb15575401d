// Runs the threads of a block as fibers: deterministic, in a chosen order, with CUDA's rules of barriers and warps checked.
#include <sys/mman.h>

#include <cstdlib>
#include <string>
#include <vector>

#define CUSIM_RUNTIME
#include "cuda.h"
#include "hooks.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#define CUSIM_UCONTEXT
#endif

namespace cusim {

Runtime runtime;
Hooks hooks;

namespace {

std::string error;
alignas(128) unsigned char dynamic_shared[232448];

}  // namespace

void fail(const std::string& text) {
  if (error.size() < 2000) error += text + "\n";
}

namespace {

enum Order { FORWARD, REVERSE, RANDOM };

const size_t STACK = 256 << 10, PAGE = 4096;
const size_t MOST_SHARED = sizeof dynamic_shared;  // 227 KiB, what one block of an H100 may have
const int MASKS = 8;                // distinct warp masks in use at a time

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Thread* thread = nullptr;
#ifdef CUSIM_UCONTEXT
  ucontext_t context;
#endif
};

// The meeting of the lanes of one mask. Two buffers in turn: the next meeting may begin before the last lane has read this one.
struct Meeting {
  unsigned mask, arrived, turn;
  Fiber* waiting[32];
  unsigned char value[2][32][16];
};

struct Warp {
  unsigned exist, exited;
  int meetings;
  Meeting meeting[MASKS];
};

Fiber main_fiber, *current;
std::vector<Fiber*> idle, ready, at_barrier;
size_t next_ready;
Thread threads[1024];
std::vector<Warp> warps;
std::vector<unsigned> start_order;
unsigned count, started, finished;
int barrier_site;
Body body;
void* arguments;
Order order;
uint64_t random_state = 1;
bool aborted;
int votes, tally;

uint64_t random_word() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

std::string line_of(int site) { return std::to_string(site & 0xffff); }

// ------------------------------------------------------------------------------------------------------------------------- fibers

void worker();

#ifdef CUSIM_UCONTEXT
void switch_to(Fiber* from, Fiber* to) {
  current = to;
  swapcontext(&from->context, &to->context);
}
void prepare(Fiber* f) {
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = STACK;
  f->context.uc_link = nullptr;
  makecontext(&f->context, worker, 0);
}
#else
extern "C" __attribute__((visibility("hidden"))) void cusim_swap(void** save, void* load);
asm(".text\n.local cusim_swap\n.type cusim_swap,@function\ncusim_swap:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
void switch_to(Fiber* from, Fiber* to) {
  current = to;
  cusim_swap(&from->stack_pointer, to->stack_pointer);
}
void prepare(Fiber* f) {
  void** top = (void**)(f->stack + STACK);
  *--top = nullptr;         // keeps the stack aligned as after a call
  *--top = (void*)worker;   // where the first switch returns to
  top -= 6;                 // the six saved registers
  memset(top, 0, 48);
  f->stack_pointer = top;
}
#endif

Fiber* idle_fiber() {
  if (!idle.empty()) {
    Fiber* f = idle.back();
    idle.pop_back();
    return f;
  }
  Fiber* f = new Fiber;
  char* memory = (char*)mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  mprotect(memory, PAGE, PROT_NONE);  // a guard below the stack
  f->stack = memory + PAGE;
  prepare(f);
  return f;
}

void wait_here(Fiber* f) {
  switch_to(f, &main_fiber);
  runtime.thread = f->thread;
}

void open_barrier() {
  tally = votes;
  votes = 0;
  ready.insert(ready.end(), at_barrier.begin(), at_barrier.end());
  at_barrier.clear();
  if (hooks.block_barrier) hooks.block_barrier();
}

// In random order a waiting thread may go on before all have started.
bool start_one_now() { return started < count && (order != RANDOM || next_ready == ready.size() || random_word() % 2); }

// A fiber runs one thread after another to its end; only a thread that waits keeps its fiber.
void worker() {
  for (;;) {
    Fiber* f = current;
    while (start_one_now()) {
      f->thread = runtime.thread = &threads[start_order[started++]];
      body(arguments);
      ++finished;
      unsigned number = f->thread->linear;
      warps[number / 32].exited |= 1u << (number % 32);
      if (!at_barrier.empty() && at_barrier.size() + finished == count) open_barrier();
    }
    idle.push_back(f);
    switch_to(f, &main_fiber);
  }
}

Fiber* next_waiting() {
  if (order == REVERSE) {
    Fiber* f = ready.back();
    ready.pop_back();
    if (ready.size() == next_ready) ready.clear(), next_ready = 0;
    return f;
  }
  if (order == RANDOM) std::swap(ready[next_ready], ready[next_ready + random_word() % (ready.size() - next_ready)]);
  Fiber* f = ready[next_ready++];
  if (next_ready == ready.size()) ready.clear(), next_ready = 0;
  return f;
}

// -------------------------------------------------------------------------------------------------------------------------- warps

Meeting& meeting_of(Warp& warp, unsigned mask) {
  for (int i = 0; i < warp.meetings; ++i)
    if (warp.meeting[i].mask == mask) return warp.meeting[i];
  if (warp.meetings == MASKS) {
    fail("a warp uses more than " + std::to_string(MASKS) + " masks");
    return warp.meeting[0];
  }
  Meeting& m = warp.meeting[warp.meetings++];
  m.mask = mask;
  m.arrived = m.turn = 0;
  return m;
}

// Wait for the lanes of the mask; returns what each of them brought.
const unsigned char (*meet(unsigned mask, const void* value, int bytes))[16] {
  Fiber* f = current;
  unsigned number = f->thread->linear, lane = number % 32;
  Warp& warp = warps[number / 32];
  if (!(mask >> lane & 1)) fail("lane " + std::to_string(lane) + " is not in its own warp mask");
  if (mask & warp.exited) fail("a warp mask names lanes that have exited");
  if (mask & ~warp.exist) fail("a warp mask names lanes that do not exist");
  Meeting& m = meeting_of(warp, mask);
  unsigned char(*values)[16] = m.value[m.turn];
  memcpy(values[lane], value, bytes);
  m.arrived |= 1u << lane;
  m.waiting[lane] = nullptr;
  unsigned needed = mask & warp.exist & ~warp.exited;
  if ((m.arrived & needed) == needed) {
    for (int i = 0; i < 32; ++i)
      if ((m.arrived >> i & 1) && m.waiting[i]) ready.push_back(m.waiting[i]);
    m.arrived = 0;
    m.turn ^= 1;
    if (hooks.warp_barrier) hooks.warp_barrier(number / 32, mask);
  } else {
    m.waiting[lane] = f;
    wait_here(f);
  }
  return values;
}

// ------------------------------------------------------------------------------------------------------------------------- blocks

void prepare_block(uint64_t number, size_t shared_bytes) {
  const dim3& grid = runtime.grid_size;
  runtime.block = {(unsigned)(number % grid.x), (unsigned)(number / grid.x % grid.y), (unsigned)(number / grid.x / grid.y)};
  for (unsigned i = 0; i < count; ++i) start_order[i] = order == REVERSE ? count - 1 - i : i;
  if (order == RANDOM)
    for (unsigned i = count; i > 1; --i) std::swap(start_order[i - 1], start_order[random_word() % i]);
  for (size_t w = 0; w < warps.size(); ++w) {
    unsigned lanes = count - 32 * w;
    warps[w].exist = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
    warps[w].exited = warps[w].meetings = 0;
  }
  if (shared_bytes) memset(runtime.dynamic, 0xff, shared_bytes);  // not a number: a read before a write shows
  started = finished = 0;
  ready.clear();
  next_ready = 0;
  at_barrier.clear();
  votes = 0;
  start_copies(count);
  if (hooks.block) hooks.block((unsigned)number);
}

// False after a deadlock or an abort; the fibers that still wait are abandoned.
bool run_block(uint64_t number) {
  while (finished < count) {
    Fiber* f;
    if (start_one_now()) {
      f = idle_fiber();
    } else if (ready.size() > next_ready) {
      f = next_waiting();
      runtime.thread = f->thread;
    } else {
      fail("deadlock in block " + std::to_string(number) + ": " + std::to_string(at_barrier.size()) + " threads at the __syncthreads of line " +
           line_of(barrier_site) + ", " + std::to_string(finished) + " exited, the rest at a warp operation");
      idle.clear();
      return false;
    }
    switch_to(&main_fiber, f);
    if (aborted) {
      idle.clear();
      return false;
    }
  }
  return true;
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------------ what others use

void block_barrier(int site) {
  if (at_barrier.empty()) barrier_site = site;
  else if (barrier_site != site)
    fail("divergent barrier: threads wait at the __syncthreads of line " + line_of(barrier_site) + " and of line " + line_of(site));
  if (at_barrier.size() + 1 + finished == count) {
    open_barrier();
    return;
  }
  at_barrier.push_back(current);
  wait_here(current);
}

int block_vote(int site, int predicate, int kind) {
  unsigned voters = count - finished;
  votes += predicate != 0;
  block_barrier(site);
  return kind == 0 ? tally : kind == 1 ? tally == (int)voters : tally != 0;
}

unsigned warp_lanes() {
  const Warp& warp = warps[runtime.thread->linear / 32];
  return warp.exist & ~warp.exited;
}

const unsigned char (*warp_gather(unsigned mask, const void* value, int bytes))[16] { return meet(mask, value, bytes); }

size_t shared_address(const void* p) { return (uintptr_t)p - (uintptr_t)dynamic_shared + (1u << 30); }

unsigned char* from_shared(uint32_t address) { return dynamic_shared + ((int64_t)address - (1 << 30)); }

bool of_runtime(uintptr_t address) {
  return address - (uintptr_t)&runtime < sizeof runtime || address - (uintptr_t)threads < sizeof threads;
}

void warp_exchange(unsigned mask, const void* value, int bytes, int source, void* result) {
  const unsigned char(*values)[16] = meet(mask, value, bytes);
  if (source < 0) return;
  if (!(mask >> source & 1) || !(warps[runtime.thread->linear / 32].exist >> source & 1)) {
    fail("a shuffle reads lane " + std::to_string(source) + ", which takes no part");
    memset(result, 0xff, bytes);
    return;
  }
  memcpy(result, values[source], bytes);
}

unsigned warp_ballot(unsigned mask, int predicate) {
  unsigned char mine = predicate != 0;
  const unsigned char(*values)[16] = meet(mask, &mine, 1);
  unsigned lanes = mask & warps[runtime.thread->linear / 32].exist, result = 0;
  for (int i = 0; i < 32; ++i)
    if ((lanes >> i & 1) && values[i][0]) result |= 1u << i;
  return result;
}

bool on_stack(uintptr_t address) { return address - (uintptr_t)current->stack < STACK; }

void abort_launch() {
  aborted = true;
  switch_to(current, &main_fiber);
}

int run(Body kernel, void* kernel_arguments, dim3 grid, dim3 block, size_t shared_bytes) {
  error.clear();
  aborted = false;
  body = kernel;
  arguments = kernel_arguments;
  runtime.grid_size = grid;
  runtime.block_size = block;
  count = block.x * block.y * block.z;
  uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
  if (count == 0 || count > 1024) fail("a block has 1 to 1024 threads, not " + std::to_string(count));
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535) fail("a grid has at least one block and at most 65535 along y and z");
  if (shared_bytes > MOST_SHARED) fail("a block has at most " + std::to_string(MOST_SHARED) + " bytes of shared memory");
  if (!error.empty()) return 1;

  runtime.dynamic = dynamic_shared;
  start_order.resize(count);
  warps.resize((count + 31) / 32);
  for (unsigned i = 0; i < count; ++i) threads[i] = {{i % block.x, i / block.x % block.y, i / (block.x * block.y)}, i};
  if (hooks.launch) hooks.launch(true);
  for (uint64_t k = 0; k < blocks; ++k) {
    uint64_t number = order == REVERSE ? blocks - 1 - k : k;
    prepare_block(number, shared_bytes);
    if (!run_block(number)) break;
  }
  if (hooks.launch) hooks.launch(false);
  return !error.empty() || aborted;
}

}  // namespace cusim

extern "C" const char* cusim_error() { return cusim::error.c_str(); }
extern "C" void cusim_order(int order, uint64_t seed) {
  cusim::order = (cusim::Order)order;
  cusim::random_state = seed * 2654435761u + 88172645463325252ull;
}

// For libraries with mutants in them (mutants.h).
namespace cusim {
int mutant;
unsigned char passed[1 << 14];
}  // namespace cusim
extern "C" void cusim_mutant(int number) { cusim::mutant = number; }
extern "C" unsigned char* cusim_passed() { return cusim::passed; }
