// Which instruction sets the vector code may use: the processor's best, or less if the environment asks for less.

#pragma once

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace minidisp {

// Each has all before it.
enum class InstructionSet { baseline, avx2, avx512, amx };

// Of the processor; amx is only the first word on it, as the system must allow it too (attention_amx.cpp).
inline InstructionSet processor_instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return InstructionSet::amx;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

// The processor's, or what the environment's MINIDISP_CPU allows of it: baseline, avx2, avx512, amx. Read at every call, so that
// a test can go through them in one process.
inline InstructionSet best_instruction_set() {
  static const InstructionSet all = processor_instruction_set();
  const char* value = std::getenv("MINIDISP_CPU");
  if (value == nullptr || *value == 0) return all;
  const std::string_view wanted = value;
  InstructionSet most = InstructionSet::baseline;
  if (wanted == "amx") most = InstructionSet::amx;
  else if (wanted == "avx512") most = InstructionSet::avx512;
  else if (wanted == "avx2") most = InstructionSet::avx2;
  else TORCH_CHECK_VALUE(wanted == "baseline", "MINIDISP_CPU is ", value, ", but must be baseline, avx2, avx512 or amx");
  return most < all ? most : all;
}

}  // namespace minidisp
