// How a tensor is cut into tiles: never across a multiple of kTile in the whole, whatever is here.
#pragma once

#include <vector>

#include "probes.h"

namespace fedkernels {

// pieces [count, 3]: first element here, first in the whole, length in the whole. With `gather`
// ([places], strictly increasing) only those elements of each piece are here.
std::vector<Tile> tiles(const std::int64_t* pieces, std::int64_t count, const std::int64_t* gather,
                        std::int64_t places);

}  // namespace fedkernels
