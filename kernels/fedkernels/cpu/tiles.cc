#include "tiles.h"

#include <algorithm>

namespace fedkernels {

std::vector<Tile> tiles(const std::int64_t* pieces, std::int64_t count, const std::int64_t* gather,
                        std::int64_t places) {
  std::vector<Tile> result;
  for (std::int64_t p = 0; p < count; ++p) {
    const std::int64_t local = pieces[3 * p], first = pieces[3 * p + 1];
    const std::int64_t end = first + pieces[3 * p + 2];
    for (std::int64_t begin = first; begin < end;) {
      const std::int64_t next = std::min(end, (begin / kTile + 1) * kTile);
      if (gather == nullptr) {
        result.push_back({local + begin - first, begin, next - begin, next - begin, nullptr, 0});
      } else {
        const std::int64_t* from = std::lower_bound(gather, gather + places, begin - first);
        const std::int64_t* to = std::lower_bound(from, gather + places, next - first);
        if (to != from) {
          result.push_back(
              {local + (from - gather), begin, next - begin, to - from, from, begin - first});
        }
      }
      begin = next;
    }
  }
  return result;
}

}  // namespace fedkernels
