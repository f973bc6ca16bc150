// Which instruction set the CPU kernels use. Files *_simd.cpp are compiled once per instruction set; the plain <op>.cpp
// asks isa() and calls the namespace that fits.
#pragma once
#include <string>

namespace sl::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The one in use. Until set_isa is called: SPARSELOTTERY_CPU_ISA (avx512, avx2, portable), else the best this CPU has.
// Throws std::invalid_argument when the environment names something unknown or something this CPU lacks.
Isa isa();

// "avx512", "avx2", "portable", or "auto" (the environment is read again). Throws like isa().
void set_isa(const std::string& name);

const char* isa_name(Isa isa);

// Whether this CPU (and this build) can run it.
bool has_isa(Isa isa);

// The threads that a kernel may use: what torch.set_num_threads says, as long as there is one OpenMP pool in the
// process.
int max_threads();

}  // namespace sl::cpu
