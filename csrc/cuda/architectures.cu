#define SLIMSTATE_TEXT(...) #__VA_ARGS__
#define SLIMSTATE_EXPANDED(...) SLIMSTATE_TEXT(__VA_ARGS__)

namespace slimstate {

extern const char* const cuda_architectures = SLIMSTATE_EXPANDED(__CUDA_ARCH_LIST__);  // "800,900": sm_80 and sm_90

}  // namespace slimstate
