// The translation unit that the emulated kernel is compiled in: EMU_TU is the generated source, which stays as it is.
#include EMU_TU

namespace {
template <class Params>
void call(void (*entry)(Params), const void* params) {
  entry(*static_cast<const Params*>(params));
}
}  // namespace

extern "C" void fm_thread(const void* params) { call(fm_entry, params); }
