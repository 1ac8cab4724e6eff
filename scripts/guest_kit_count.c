/*
 * A QEMU TCG plugin that counts executed instructions per translated block until the guest first runs the block
 * at `stop`, and writes "address count" lines to `out`. scripts/guest-kit-count compiles and loads it.
 *
 * Debian 12 ships no qemu-plugin.h; the declarations are those of plugin API version 1 (QEMU, docs/devel/tcg-plugins).
 * A repeated string instruction counts once for each repetition, as it costs where kernels are interpreted.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t plugin_id;
struct qemu_plugin_tb;

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), int, void *);
void qemu_plugin_register_atexit_cb(plugin_id, void (*)(plugin_id, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);

EXPORT int qemu_plugin_version = 1;

struct block {
	uint64_t address, instructions, executed;
	struct block *next;
};

static struct block *blocks;
static uint64_t stop;
static const char *out;
static bool counting = true;

static void on_execution(unsigned vcpu, void *data)
{
	struct block *block = data;

	(void)vcpu;
	if (block->address == stop)
		counting = false;
	if (counting)
		block->executed += block->instructions;
}

static void on_translation(plugin_id id, struct qemu_plugin_tb *tb)
{
	struct block *block = calloc(1, sizeof *block);

	(void)id;
	if (!block)
		abort();
	block->address = qemu_plugin_tb_vaddr(tb);
	block->instructions = qemu_plugin_tb_n_insns(tb);
	block->next = blocks;
	blocks = block;
	qemu_plugin_register_vcpu_tb_exec_cb(tb, on_execution, 0, block);
}

static void write_counts(plugin_id id, void *data)
{
	FILE *file = fopen(out, "w");

	(void)id;
	(void)data;
	if (!file)
		return;
	for (struct block *block = blocks; block; block = block->next)
		if (block->executed)
			fprintf(file, "%" PRIx64 " %" PRIu64 "\n", block->address, block->executed);
	fclose(file);
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
	(void)info;
	for (int at = 0; at < argc; at++) {
		if (!strncmp(argv[at], "out=", 4))
			out = strdup(argv[at] + 4);
		else if (!strncmp(argv[at], "stop=", 5))
			stop = strtoull(argv[at] + 5, NULL, 0);
	}
	if (!out)
		return -1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
	qemu_plugin_register_atexit_cb(id, write_counts, NULL);
	return 0;
}
