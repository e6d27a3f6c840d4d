#include "cpu/scratch.h"

#include <cstring>
#include <thread>

#include "support.h"

namespace bitfold {
namespace {

bool begins_a_page(const Scratch& scratch) {
  return reinterpret_cast<uintptr_t>(scratch.data()) % 4096 == 0;
}

TEST(Scratch, BeginsWithAPageAndCanBeWritten) {
  for (int64_t bytes : {0, 1, 4095, 4096, 100000, 40 << 20}) {
    const Scratch scratch(bytes);
    EXPECT_TRUE(begins_a_page(scratch)) << bytes;
    memset(scratch.data(), 1, static_cast<size_t>(bytes));
  }
}

// In a thread of its own, which has kept nothing yet.
template <class Body>
void in_a_new_thread(const Body& body) {
  std::thread(body).join();
}

TEST(Scratch, ACallUsesThePiecesOfTheLastOne) {
  in_a_new_thread([] {
    const auto call = [](int64_t outer, int64_t inner) {
      const Scratch whole(outer), share(inner);
      EXPECT_NE(whole.data(), share.data());
      memset(whole.data(), 1, static_cast<size_t>(outer));
      memset(share.data(), 2, static_cast<size_t>(inner));
      return std::pair(whole.data(), share.data());
    };
    const auto first = call(1 << 20, 1 << 16);
    EXPECT_EQ(call(1 << 20, 1 << 16), first);
    EXPECT_EQ(call(1 << 19, 1 << 15), first) << "smaller ones fit";
    call(1 << 21, 1 << 16);
    const auto larger = call(1 << 21, 1 << 16);
    EXPECT_EQ(call(1 << 21, 1 << 16), larger);
  });
}

TEST(Scratch, MoreAtOnceThanAreKept) {
  in_a_new_thread([] {
    for (int turn = 0; turn < 3; ++turn) {
      const Scratch a(5000), b(6000), c(7000), d(8000);
      uint8_t* const all[] = {a.data(), b.data(), c.data(), d.data()};
      for (uint8_t i = 0; i < 4; ++i) memset(all[i], i, 5000);
      for (uint8_t i = 0; i < 4; ++i) EXPECT_EQ(all[i][4999], i);
    }
  });
}

}  // namespace
}  // namespace bitfold
