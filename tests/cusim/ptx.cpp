// The PTX instructions that kernels use inline: products on the tensor cores, ldmatrix, cp.async, conversions.
//
// A text is taken apart once. Fragments lie in the lanes as the PTX manual says. Products are exact in double and rounded to float once for
// each element of the result, which is a little better than the hardware. A copy of cp.async lands when its group is waited for, not before.
#include <cstdlib>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#define CUSIM_RUNTIME
#include "cuda.h"
#include "hooks.h"

namespace cusim {
namespace {

const unsigned WARP = 0xffffffffu;

struct Argument {
  int operand;     // its number, or -1 for a number in the text
  int64_t number;  // that number, or what is added to an address
};

struct Instruction {
  std::vector<std::string> name;  // the parts of mma.sync.aligned. …
  std::vector<Argument> arguments;
};

struct Call {
  const Instruction& instruction;
  const Operand* operands;
  uintptr_t code;

  size_t size() const { return instruction.arguments.size(); }
  bool has(const char* part) const {
    for (auto& p : instruction.name)
      if (p == part) return true;
    return false;
  }
  template <class T> T get(size_t i) const {
    const Argument& a = instruction.arguments.at(i);
    uint64_t bits = 0;
    if (a.operand >= 0) memcpy(&bits, operands[a.operand].place, std::min<size_t>(8, operands[a.operand].bytes));
    bits += a.number;
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  template <class T> void set(size_t i, T value) const {
    const Operand& o = operands[instruction.arguments.at(i).operand];
    memcpy(o.place, &value, std::min(sizeof value, o.bytes));
  }
};

std::vector<Instruction> parse(const std::string& text) {
  std::vector<Instruction> found;
  size_t i = 0;
  while (i < text.size()) {
    size_t end = std::min(text.find(';', i), text.size());
    std::string line = text.substr(i, end - i);
    i = end + 1;
    size_t k = line.find_first_not_of(" \t\n");
    if (k == std::string::npos) continue;
    Instruction in;
    size_t stop = std::min(line.find_first_of(" \t\n", k), line.size());
    for (size_t from = k; from < stop;) {
      size_t dot = std::min(line.find('.', from), stop);
      if (dot > from) in.name.push_back(line.substr(from, dot - from));
      from = dot + 1;
    }
    for (k = stop; k < line.size();) {
      char c = line[k];
      bool added = c == '+';
      if (added) ++k, k = std::min(line.find_first_not_of(" \t\n", k), line.size());
      char* after = nullptr;
      if (line[k] == '%') {
        in.arguments.push_back({(int)strtol(line.c_str() + k + 1, &after, 10), 0});
      } else if (isdigit((unsigned char)line[k]) || line[k] == '-') {
        int64_t number = strtoll(line.c_str() + k, &after, 0);
        if (added && !in.arguments.empty()) in.arguments.back().number += number;
        else in.arguments.push_back({-1, number});
      } else {
        ++k;
        continue;
      }
      k = after - line.c_str();
    }
    found.push_back(in);
  }
  return found;
}

// ---------------------------------------------------------------------------------------------------------------- tensor cores

float bf16(unsigned bits) { return cusim_bits<float>(bits << 16); }
float f16(unsigned bits) { return (float)cusim_bits<_Float16>((uint16_t)bits); }
float tf32(unsigned bits) { return cusim_bits<float>(bits & 0xffffe000u); }

unsigned to_bf16(float f) {
  unsigned u = cusim_bits<unsigned>(f);
  return f != f ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
unsigned to_f16(float f) { return cusim_bits<uint16_t>((_Float16)f); }

// d = a b + c, 16 x 8, over `depth` products: two to a register (bf16, f16) or one (tf32)
void multiply(const Call& call, int depth, bool packed, float (*value)(unsigned)) {
  int of_a = depth / (packed ? 4 : 2), of_b = of_a / 2, lane = runtime.thread->linear % 32;
  unsigned mine[4] = {}, a[32][4], b[32][4];
  for (int i = 0; i < of_a; ++i) mine[i] = call.get<unsigned>(4 + i);
  memcpy(a, warp_gather(WARP, mine, 16), sizeof a);
  for (int i = 0; i < of_b; ++i) mine[i] = call.get<unsigned>(4 + of_a + i);
  memcpy(b, warp_gather(WARP, mine, 16), sizeof b);
  auto element = [&](const unsigned* registers, int of_pair, int k) {  // registers: those of a lane; of_pair: the register of k < half
    unsigned bits = registers[of_pair];
    return value(packed ? (k % 2 ? bits >> 16 : bits & 0xffffu) : bits);
  };
  int half = depth / 2, per = packed ? 2 : 1;  // k = 0 .. half - 1 lie `per` to a lane in the lanes of a group of four
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
    double sum = call.get<float>(4 + of_a + of_b + i);
    for (int k = 0; k < depth; ++k) {
      int late = k >= half, within = k % half / per;
      // a: registers (row < 8, early), (row >= 8, early), (row < 8, late), (row >= 8, late)
      float left = element(a[row % 8 * 4 + within], (row >= 8) + 2 * late, k), right = element(b[column * 4 + within], late, k);
      sum += (double)left * right;
    }
    call.set(i, (float)sum);
  }
}

void load_matrices(const Call& call) {
  int count = call.has("x4") ? 4 : call.has("x2") ? 2 : 1, lane = runtime.thread->linear % 32;
  uint32_t address = call.get<uint32_t>(count), all[32];
  const unsigned char(*given)[16] = warp_gather(WARP, &address, 4);
  for (int i = 0; i < 32; ++i) memcpy(&all[i], given[i], 4);
  if (lane < 8 * count && hooks.access) hooks.access((uintptr_t)from_shared(address), 16, false, call.code);
  for (int m = 0; m < count; ++m) {
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      int row = lane / 4, column = lane % 4 * 2 + k;
      if (call.has("trans")) std::swap(row, column);
      memcpy(&pair[k], from_shared(all[8 * m + row]) + 2 * column, 2);
    }
    call.set(m, (uint32_t)pair[0] | (uint32_t)pair[1] << 16);
  }
}

// -------------------------------------------------------------------------------------------------------------------- cp.async

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, filled;  // bytes beyond `filled` become zero
};

std::vector<std::vector<std::vector<Copy>>> groups;  // of each thread, in order; the last is open

void land(const std::vector<Copy>& copies) {
  for (auto& c : copies) {
    memcpy(c.to, c.from, c.filled);
    memset(c.to + c.filled, 0, c.bytes - c.filled);
    if (hooks.copy) hooks.copy((uintptr_t)c.to, c.bytes, true);
  }
}

void copy(const Call& call) {
  auto& mine = groups[runtime.thread->linear];
  if (call.has("commit_group")) {
    mine.emplace_back();
    return;
  }
  if (call.has("wait_group") || call.has("wait_all")) {
    if (call.has("wait_all")) mine.emplace_back();
    size_t left = call.has("wait_all") ? 0 : call.get<int>(0);
    while (mine.size() > left + 1) {
      land(mine.front());
      mine.erase(mine.begin());
    }
    return;
  }
  int bytes = call.get<int>(2), filled = call.size() > 3 ? call.get<int>(3) : bytes;
  Copy c{from_shared(call.get<uint32_t>(0)), call.get<const unsigned char*>(1), bytes, filled};
  bool known = (bytes == 16 || (call.has("ca") && (bytes == 4 || bytes == 8))) && filled >= 0 && filled <= bytes;
  if (!known || (uintptr_t)c.to % bytes || (uintptr_t)c.from % bytes) {
    fail("cp.async of " + std::to_string(bytes) + " bytes: ca takes 4, 8 or 16, cg takes 16, at multiples of the size");
    return abort_launch();
  }
  if (hooks.access) {
    if (filled == bytes) hooks.access((uintptr_t)c.from, bytes, false, call.code);
    hooks.access((uintptr_t)c.to, bytes, true, call.code);
    hooks.copy((uintptr_t)c.to, bytes, false);
  }
  mine.back().push_back(c);
}

// ----------------------------------------------------------------------------------------------------------------- conversions

bool convert(const Call& call) {
  bool two = call.size() == 3;
  if (call.has("bf16x2") || call.has("f16x2")) {
    auto to = call.has("bf16x2") ? to_bf16 : to_f16;
    call.set(0, to(call.get<float>(1)) << 16 | to(call.get<float>(2)));
  } else if (two) {
    return false;
  } else if (call.has("tf32")) {
    call.set(0, (call.get<unsigned>(1) + 0x1000u) & 0xffffe000u);
  } else if (call.instruction.name.back() == "f32" && call.has("bf16")) {
    call.set(0, (uint16_t)to_bf16(call.get<float>(1)));
  } else if (call.instruction.name.back() == "f32" && call.has("f16")) {
    call.set(0, (uint16_t)to_f16(call.get<float>(1)));
  } else if (call.instruction.name.back() == "f16" && call.has("f32")) {
    call.set(0, f16(call.get<uint16_t>(1)));
  } else if (call.instruction.name.back() == "bf16" && call.has("f32")) {
    call.set(0, bf16(call.get<uint16_t>(1)));
  } else {
    return false;
  }
  return true;
}

bool approximate(const Call& call) {
  static const std::map<std::string, float (*)(float)> FUNCTIONS = {
      {"ex2", [](float v) { return exp2f(v); }},        {"lg2", [](float v) { return log2f(v); }},
      {"rcp", [](float v) { return 1.0f / v; }},        {"rsqrt", [](float v) { return 1.0f / sqrtf(v); }},
      {"tanh", [](float v) { return tanhf(v); }},       {"sqrt", [](float v) { return sqrtf(v); }},
  };
  auto found = FUNCTIONS.find(call.instruction.name[0]);
  if (found == FUNCTIONS.end() || call.size() != 2) return false;
  call.set(0, found->second(call.get<float>(1)));
  return true;
}

bool execute(const Call& call) {
  const std::string& name = call.instruction.name[0];
  if (name == "cvt") return convert(call);
  if (name == "cp" && call.has("async")) return copy(call), true;
  if (name == "ldmatrix" && call.has("b16")) return load_matrices(call), true;
  if (name == "mma" && call.has("row") && call.has("col")) {
    if (call.has("m16n8k16") && call.has("bf16")) return multiply(call, 16, true, bf16), true;
    if (call.has("m16n8k16") && call.has("f16")) return multiply(call, 16, true, f16), true;
    if (call.has("m16n8k8") && call.has("tf32")) return multiply(call, 8, false, tf32), true;
    return false;
  }
  return approximate(call);
}

}  // namespace

void start_copies(unsigned threads) { groups.assign(threads, {{}}); }

void ptx(const char* text, const Operand* operands, int count, uintptr_t code) {
  static std::unordered_map<std::string, std::vector<Instruction>> known;
  auto found = known.find(text);
  if (found == known.end()) found = known.emplace(text, parse(text)).first;
  for (auto& instruction : found->second) {
    for (auto& a : instruction.arguments)
      if (a.operand >= count) {
        fail("PTX names an operand that it does not have: " + std::string(text));
        return abort_launch();
      }
    if (!execute({instruction, operands, code})) {
      fail("PTX instruction that this runner does not know: " + std::string(text));
      return abort_launch();
    }
  }
}

}  // namespace cusim
