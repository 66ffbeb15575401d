// What the scheduler tells the checker, and what the checker asks of it.
#pragma once
#include <cstdint>

namespace cusim {

struct Hooks {
  void (*launch)(bool begins);
  void (*block)(unsigned number);
  void (*block_barrier)();
  void (*warp_barrier)(unsigned warp, unsigned mask);
};
extern Hooks hooks;  // null without the checker

bool on_stack(uintptr_t address);  // of the running fiber
void abort_launch();               // leave the launch at once; its fibers are abandoned

}  // namespace cusim
