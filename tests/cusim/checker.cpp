// A runtime for the hooks that g++ -fsanitize=thread,bounds plants at every memory access, with CUDA's rules in place of a system thread's.
//
// Linked instead of libtsan and libubsan. It reports, with array and source line: accesses out of bounds or misaligned, races (within a warp, a block or
// the grid), reads of shared memory that nothing wrote and of cp.async's data before they are waited for. Where asked for, it counts for
// each instruction the 32-byte sectors (global memory) and the passes through the banks (shared memory) of a warp's requests.
#include <dlfcn.h>
#include <link.h>

#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#define CUSIM_RUNTIME
#include "cuda.h"
#include "hooks.h"

namespace cusim {
namespace {

enum Kind { GLOBAL, STATIC_SHARED, DYNAMIC_SHARED, CONSTANT };

const int GRANULE = 2;  // bytes that share one record
const int BANKS = 32;   // of shared memory, 4 bytes wide
const size_t NEAR = 1 << 20, MOST_REPORTS = 40;

// One access: who, and when (how many barriers of the block and of the warp lay before it). No thread: none yet.
struct Access {
  uint32_t thread = 0, block_epoch = 0, warp_epoch = 0;
  bool atomic = false;
};

struct Cell {
  Access write, read;
  bool read_by_several = false, written = false, under_way = false;
};

struct Region {
  uintptr_t begin, end;
  Kind kind;
  std::string name;
  std::vector<Cell> cells;
};

struct Request {  // what the lanes of a warp ask for at one execution of one instruction
  uint64_t address[32];
  uint32_t lanes;
};

struct Site {  // one instruction and one kind of memory
  int bytes = 0;
  bool write = false, shared = false;
  uint64_t requests = 0, useful = 0, sectors = 0, passes = 0, phases = 0;
  std::vector<uint32_t> executions;            // of each thread of the block
  std::unordered_map<uint64_t, Request> open;  // by execution and warp
};

std::vector<Region> regions;
Region* last_region;
std::map<std::string, int> reports;
std::unordered_map<uintptr_t, Site> sites;
bool watching, counting;
uint32_t block_number, block_epoch = 1, warp_clock = 1, warp_epoch[1024];
uintptr_t library_begin;
std::vector<std::pair<uintptr_t, uintptr_t>> read_only;  // segments of the library

// "@0x..." is turned into file and line by the loader.
std::string at(uintptr_t code) {
  char text[40];
  snprintf(text, sizeof text, "@0x%lx", (unsigned long)(code - library_begin - 1));
  return text;
}

void report(const std::string& text) {
  if (reports.size() < MOST_REPORTS || reports.count(text)) ++reports[text];
}

Region* region_of(uintptr_t address) {
  if (last_region && address >= last_region->begin && address < last_region->end) return last_region;
  for (auto& r : regions)
    if (address >= r.begin && address < r.end) return last_region = &r;
  return nullptr;
}

std::string nearest(uintptr_t address) {
  size_t least = NEAR;
  std::string text;
  for (auto& r : regions) {
    bool before = address < r.begin;
    size_t distance = before ? r.begin - address : address - r.end;
    if (distance < least) {
      least = distance;
      text = ": " + std::to_string(distance) + " bytes " + (before ? "before " : "after ") + r.name;
    }
  }
  return text;
}

bool ordered(const Access& earlier, const Access& now) {
  if (!earlier.thread || earlier.thread == now.thread) return true;
  uint32_t a = earlier.thread - 1, b = now.thread - 1;
  if (a >> 10 != b >> 10) return false;  // another block of the launch
  if (earlier.block_epoch != now.block_epoch) return true;
  return a >> 5 == b >> 5 && earlier.warp_epoch < now.warp_epoch;
}

void check_read(Cell& c, const Access& now, const Region& r, uintptr_t code) {
  if (r.kind != GLOBAL && !c.written) {
    report("read of unwritten shared memory, " + r.name + " " + at(code));
    c.written = true;
  }
  if (c.under_way) report("read of shared memory before cp.async.wait_group, " + r.name + " " + at(code));
  if (!ordered(c.write, now)) report("race: read after write, " + r.name + " " + at(code));
  c.read_by_several = !ordered(c.read, now);
  c.read = now;
}

void check_write(Cell& c, const Access& now, const Region& r, uintptr_t code) {
  if (!(now.atomic && c.write.atomic) && !ordered(c.write, now)) report("race: two writes, " + r.name + " " + at(code));
  bool among_others = c.read_by_several && c.read.thread == now.thread && c.read.block_epoch == now.block_epoch;
  if (among_others || !ordered(c.read, now)) report("race: write after read, " + r.name + " " + at(code));
  c.write = now;
  c.written = true;
}

// The k-th execution of an instruction by each lane is taken for one request of the warp.
void count(uintptr_t address, int bytes, bool write, bool shared, uintptr_t code) {
  Site& s = sites[2 * code + shared];
  if (s.executions.empty()) s.executions.assign(1024, 0);
  s.bytes = bytes;
  s.write = write;
  s.shared = shared;
  uint32_t number = runtime.thread->linear;
  Request& q = s.open[(uint64_t)s.executions[number]++ << 6 | number / 32];
  q.address[number % 32] = address;
  q.lanes |= 1u << (number % 32);
}

void access(uintptr_t address, int bytes, bool write, bool atomic, uintptr_t code) {
  if (!watching || on_stack(address) || of_runtime(address)) return;
  Region* r = region_of(address);
  if (!r) {
    if (!write)
      for (auto& segment : read_only)
        if (address >= segment.first && address < segment.second) return;  // a constant of the file
    report(std::string(write ? "out-of-bounds write " : "out-of-bounds read ") + at(code) + nearest(address));
    abort_launch();
  }
  if (address + bytes > r->end) {
    report("out-of-bounds access across the end of " + r->name + " " + at(code));
    abort_launch();
  }
  if (address % bytes) {
    report(std::to_string(bytes) + "-byte access misaligned " + at(code));
    abort_launch();
  }
  uint32_t number = runtime.thread->linear;
  Access now{(block_number << 10 | number) + 1, block_epoch, warp_epoch[number], atomic};
  for (uintptr_t b = address; b < address + bytes; b += GRANULE) {
    Cell& c = r->cells[(b - r->begin) / GRANULE];
    if (write) check_write(c, now, *r, code);
    else check_read(c, now, *r, code);
  }
  if (counting && r->kind != CONSTANT) count(address, bytes, write, r->kind != GLOBAL, code);
}

// 4-byte accesses of a warp go through the banks at once, those of 8 bytes in halves of a warp, those of 16 bytes in quarters. A bank gives
// one word in a pass, to every lane that asks for it.
void count_passes(Site& s, const Request& q) {
  int together = s.bytes <= 4 ? 32 : 128 / s.bytes;
  for (int first = 0; first < 32; first += together) {
    std::set<uint64_t> words[BANKS];
    size_t most = 0;
    for (int lane = first; lane < first + together; ++lane) {
      if (!(q.lanes >> lane & 1)) continue;
      for (uint64_t w = q.address[lane] / 4; w <= (q.address[lane] + s.bytes - 1) / 4; ++w) {
        words[w % BANKS].insert(w);
        most = std::max(most, words[w % BANKS].size());
      }
    }
    s.passes += most;
    s.phases += most > 0;
  }
}

void count_sectors(Site& s, const Request& q) {
  std::set<uint64_t> sectors;
  for (int lane = 0; lane < 32; ++lane)
    if (q.lanes >> lane & 1)
      for (uint64_t k = q.address[lane] / 32; k <= (q.address[lane] + s.bytes - 1) / 32; ++k) sectors.insert(k);
  s.sectors += sectors.size();
}

void count_requests() {
  for (auto& entry : sites) {
    Site& s = entry.second;
    for (auto& open : s.open) {
      ++s.requests;
      s.useful += (uint64_t)s.bytes * __builtin_popcount(open.second.lanes);
      if (s.shared) count_passes(s, open.second);
      else count_sectors(s, open.second);
    }
    s.open.clear();
    s.executions.assign(1024, 0);
  }
}

int find_segments(dl_phdr_info* info, size_t, void*) {
  if (info->dlpi_addr != library_begin) return 0;
  for (int k = 0; k < info->dlpi_phnum; ++k) {
    const auto& header = info->dlpi_phdr[k];
    bool relocated = header.p_type == PT_GNU_RELRO;
    if (relocated || (header.p_type == PT_LOAD && !(header.p_flags & PF_W)))
      read_only.push_back({library_begin + header.p_vaddr, library_begin + header.p_vaddr + header.p_memsz});
  }
  return 0;
}

uintptr_t library() {
  Dl_info info;
  dladdr((void*)&library, &info);
  return (uintptr_t)info.dli_fbase;
}

void on_launch(bool begins) {
  watching = begins;
  if (!begins) return count_requests();
  reports.clear();
  sites.clear();
  library_begin = library();
  read_only.clear();
  dl_iterate_phdr(find_segments, nullptr);
  for (auto& r : regions) r.cells.assign((r.end - r.begin + GRANULE - 1) / GRANULE, Cell());
}

void on_block(unsigned number) {
  if (counting) count_requests();
  block_number = number;
  ++block_epoch;
  last_region = nullptr;
  for (auto& r : regions) {
    if (r.kind == GLOBAL || r.kind == CONSTANT) continue;
    if (r.kind == DYNAMIC_SHARED) {
      r.end = (uintptr_t)runtime.dynamic + (r.end - r.begin);
      r.begin = (uintptr_t)runtime.dynamic;
    }
    r.cells.assign(r.cells.size(), Cell());
  }
}

void on_block_barrier() { ++block_epoch; }

void on_warp_barrier(unsigned warp, unsigned mask) {
  ++warp_clock;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) warp_epoch[warp * 32 + lane] = warp_clock;
}

void on_access(uintptr_t address, int bytes, bool write, uintptr_t code) { access(address, bytes, write, false, code); }

void on_copy(uintptr_t address, int bytes, bool landed) {
  Region* r = region_of(address);
  uint32_t number = runtime.thread->linear;
  for (uintptr_t b = address; r && b < address + bytes; b += GRANULE) {
    Cell& c = r->cells[(b - r->begin) / GRANULE];
    c.under_way = !landed;
    c.write = {(block_number << 10 | number) + 1, block_epoch, warp_epoch[number], false};
  }
}

struct Install {
  Install() { hooks = {on_launch, on_block, on_block_barrier, on_warp_barrier, on_access, on_copy}; }
} install;

}  // namespace
}  // namespace cusim

using namespace cusim;

extern "C" {

// The loader's side: which memory there is, and what was found.
void cusim_forget() {
  std::vector<Region> kept;
  for (auto& r : regions)
    if (r.kind == STATIC_SHARED || r.kind == CONSTANT) kept.push_back(r);
  regions.swap(kept);
  last_region = nullptr;
}
void cusim_argument(void* place, size_t bytes, const char* name) {
  regions.push_back({(uintptr_t)place, (uintptr_t)place + bytes, GLOBAL, name, {}});
}
void cusim_dynamic(size_t bytes) { regions.push_back({0, bytes, DYNAMIC_SHARED, "dynamic shared memory", {}}); }
void cusim_static(uint64_t offset, size_t bytes, const char* name) {
  uintptr_t place = library() + offset;
  regions.push_back({place, place + bytes, STATIC_SHARED, std::string("shared ") + name, {}});
}
void cusim_constant(uint64_t offset, size_t bytes, const char* name) {
  uintptr_t place = library() + offset;
  regions.push_back({place, place + bytes, CONSTANT, std::string("constant ") + name, {}});
}
void cusim_count(int on) { counting = on; }
const char* cusim_reports() {
  static std::string text;
  text.clear();
  for (auto& r : reports) text += r.first + " (" + std::to_string(r.second) + " times)\n";
  return text.c_str();
}
// One line for each instruction and kind of memory: place, load or store, memory, bytes, requests, useful bytes, sectors, passes, phases.
const char* cusim_traffic() {
  static std::string text;
  text.clear();
  for (auto& entry : sites) {
    const Site& s = entry.second;
    text += at(entry.first / 2) + (s.write ? " store " : " load ") + (s.shared ? "shared" : "global");
    for (uint64_t v : {(uint64_t)s.bytes, s.requests, s.useful, s.sectors, s.passes, s.phases}) text += " " + std::to_string(v);
    text += "\n";
  }
  return text.c_str();
}

// The compiler's side.
#define CALLER (uintptr_t)__builtin_return_address(0)
void cusim_atomic(void* place, size_t bytes, void* code) { access((uintptr_t)place, (int)bytes, true, true, (uintptr_t)code); }
#define ACCESSES(BYTES)                                                                            \
  void __tsan_read##BYTES(void* p) { access((uintptr_t)p, BYTES, false, false, CALLER); }          \
  void __tsan_write##BYTES(void* p) { access((uintptr_t)p, BYTES, true, false, CALLER); }          \
  void __tsan_unaligned_read##BYTES(void* p) { access((uintptr_t)p, BYTES, false, false, CALLER); } \
  void __tsan_unaligned_write##BYTES(void* p) { access((uintptr_t)p, BYTES, true, false, CALLER); }
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
void __tsan_read_range(void* p, size_t n) {
  for (size_t i = 0; i < n; i += 4) access((uintptr_t)p + i, 4, false, false, CALLER);
}
void __tsan_write_range(void* p, size_t n) {
  for (size_t i = 0; i < n; i += 4) access((uintptr_t)p + i, 4, true, false, CALLER);
}
void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
  report("index " + std::to_string((int64_t)index) + " lies outside of its array " + at(CALLER));
  abort_launch();
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}

}  // extern "C"
