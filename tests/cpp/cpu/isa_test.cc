#include "cpu/isa.h"

#include <sys/wait.h>
#include <unistd.h>

#include "support.h"

namespace bitfold {
namespace {

TEST(Isa, PortableIsLastAndAlwaysRuns) {
  ASSERT_FALSE(instruction_sets().empty());
  EXPECT_STREQ(instruction_sets().back().name, "portable");
  EXPECT_TRUE(instruction_sets().back().supported());
}

TEST(Isa, WiderSetsComeFirst) {
  std::vector<std::string> names;
  for (const InstructionSet& isa : instruction_sets()) names.push_back(isa.name);
#if defined(__x86_64__)
  EXPECT_EQ(names, (std::vector<std::string>{"amx", "avx512vnni", "avx512", "avx2", "portable"}));
#else
  EXPECT_EQ(names, std::vector<std::string>{"portable"});
#endif
  // What a CPU with the first has, it has for the ones after it.
  bool before = false;
  for (const InstructionSet& isa : instruction_sets()) {
    EXPECT_TRUE(isa.supported() || !before) << isa.name;
    before = before || isa.supported();
  }
}

TEST(Isa, EachNameIsChosenOrRefusedByName) {
  for (const InstructionSet& isa : instruction_sets()) {
    const InstructionSet* chosen = nullptr;
    const Status status = choose_instruction_set(isa.name, &chosen);
    EXPECT_EQ(status.ok(), isa.supported());
    if (status.ok()) {
      EXPECT_EQ(chosen, &isa);
    } else {
      EXPECT_NE(status.message.find(isa.name), std::string::npos) << status.message;
      EXPECT_NE(status.message.find("this machine lacks"), std::string::npos) << status.message;
    }
  }
}

TEST(Isa, UnknownNamesAreRefused) {
  for (const char* name : {"avx1024", "AVX2", "", "portable "}) {
    const InstructionSet* chosen = nullptr;
    const Status status = choose_instruction_set(name, &chosen);
    EXPECT_FALSE(status.ok()) << name;
    EXPECT_EQ(status.code, StatusCode::kInvalidArgument);
    EXPECT_NE(status.message.find("unknown instruction set; known: "), std::string::npos)
        << status.message;
    EXPECT_NE(status.message.find("portable"), std::string::npos) << status.message;
  }
}

TEST(Isa, WithoutAWishTheFirstSupportedOneRuns) {
  const InstructionSet* chosen = nullptr;
  ASSERT_TRUE(choose_instruction_set(nullptr, &chosen).ok());
  for (const InstructionSet& isa : instruction_sets()) {
    if (!isa.supported()) continue;
    EXPECT_EQ(chosen, &isa);
    break;
  }
}

// The environment is read once per process, so each case asks in a child.
int exit_code_with(const char* value) {
  const pid_t child = fork();
  if (child == 0) {
    value ? setenv("BITFOLD_ISA", value, 1) : unsetenv("BITFOLD_ISA");
    Status status;
    const InstructionSet* isa = active_instruction_set(&status);
    if (!status.ok()) _exit(2);
    _exit(value && *value && strcmp(isa->name, value) != 0 ? 1 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WEXITSTATUS(status);
}

TEST(Isa, TheEnvironmentDecides) {
  EXPECT_EQ(exit_code_with("portable"), 0);
  EXPECT_EQ(exit_code_with("warp"), 2);
  EXPECT_EQ(exit_code_with(""), 0) << "empty means unset";
  EXPECT_EQ(exit_code_with(nullptr), 0);
}

}  // namespace
}  // namespace bitfold
