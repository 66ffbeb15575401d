// What the scheduler tells the checker, and what the checker asks of it.
#pragma once
#include <cstdint>
#include <string>

namespace cusim {

struct Hooks {
  void (*launch)(bool begins);
  void (*block)(unsigned number);
  void (*block_barrier)();
  void (*warp_barrier)(unsigned warp, unsigned mask);
  void (*access)(uintptr_t address, int bytes, bool write, uintptr_t code);  // of a PTX instruction
  void (*copy)(uintptr_t address, int bytes, bool landed);                    // cp.async to shared memory: under way, or landed
};
extern Hooks hooks;  // null without the checker

bool on_stack(uintptr_t address);  // of the running fiber
void fail(const std::string& text);
const unsigned char (*warp_gather(unsigned mask, const void* value, int bytes))[16];  // what each lane brought, until the next meeting
void start_copies(unsigned threads);                                                  // a block begins: no thread has a copy under way
unsigned char* from_shared(uint32_t address);                                        // the inverse of shared_address
bool of_runtime(uintptr_t address);                                                  // threadIdx and its like
void abort_launch();               // leave the launch at once; its fibers are abandoned

}  // namespace cusim
