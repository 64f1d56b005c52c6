// Compiles the vector code of a block's small operators, layers_tile.h, once per instruction set.

#include "layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "host.h"
#include "numbers.h"

namespace minidisp {
namespace {

using Kernels = BlockKernels;

#define MINIDISP_TILE "layers_tile.h"
#include "instruction_sets.h"

}  // namespace

const BlockKernels& layer_kernels() { return choose_kernels(); }

}  // namespace minidisp
