/* Every order of events around one key and the freshness leases of two nodes, or of one server.

   The parts are said in test_freshness_model.py, which compiles and runs this. It is C because the states are many.
   By hand: gcc -O2 -o /tmp/model freshness_model.c && /tmp/model BOUND=NUMBER ... [RULE]

   The last line tells how many states there are. If a hit is stale, the lines before it tell the events that led to it,
   and the status is 1. Two states that differ only in the names of epochs and of runs are counted as one. Of a state
   64 bits are kept: that two of a hundred million are taken for one has a chance of 1 in 4,000. */

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;

enum { NODES = 2, RELAYS = 2, NAMES = 32, HISTORIES = 5, EPOCHS = 12, DEEPEST = 256 };
/* A name that no epoch and no run has yet. */
enum { NEW = NAMES - 1 };

static struct {
    const char *name;
    int most;
} bounds[] = {
    {"writes", 1}, {"fills", 1},
    /* Moves of the key's slot, and of the slot of the first node's lease. */
    {"moves", 0}, {"rovings", 0},
    /* Failovers, or restarts with older data. */
    {"fails", 1},
    /* Runs of all relays; those at the same time; and the nodes that have relays. */
    {"runs", 2}, {"at_once", 2}, {"relays", 2},
    /* Does the second node use the first one's key for its lease while it has that slot? */
    {"adopts", 0},
    /* 0: one server, which tells of no slots and no history. */
    {"cluster", 1},
};
enum { WRITES, FILLS, MOVES, ROVINGS, FAILS, RUNS, AT_ONCE, RELAYING, ADOPTS, CLUSTER, BOUNDS };

static const char *const rules[] = {
    "a value is used only where the lease covers its slot",
    "a value is stored only where the lease covers its slot",
    "a slot that comes back begins a new epoch",
    "a redirected invalidation ends the run",
    "a lease is valid only on the data that it is of",
    "data must be as long as when Redis was told",
    "a length that is not known is no proof",
    "a run goes on only on the data that the lease is of",
    "a run goes on only where PostgreSQL knows the lease's number",
    "the last number is written after the invalidations",
    "a run that has connected anew acknowledges nothing",
    "a run begins only if the lease is as it was read",
    "a run is acknowledged only if the lease has its first number",
    "a lease becomes valid only if it has the last number",
    "a lease's time is from before PostgreSQL was read",
};
enum {
    USED, STORED, COMES_BACK, REDIRECTED, OF_DATA, LONG_ENOUGH, KNOWN_LENGTH, GOES_ON, CONFIRMED, LAST_NUMBER,
    CONNECTED, AS_READ, FIRST_NUMBER, STILL_TOLD, BEFORE, RULES
};
static int without = RULES;

#define RULE(rule) (without != (rule))
#define MOST(bound) (bounds[bound].most)

/* A lease. `at`: the writes that were committed when its run began, and one; 0: it is not valid yet. */
typedef struct {
    u8 epoch, run, confirmed, at, data, length, covers, left;
} Record;

/* The data of a node. `version`: of the value, and one. `length`: how often it was told. `roving`: the record in the
   slot that moves, while it is here. */
typedef struct {
    u8 version, epoch, fill, length;
    Record own, roving;
} Store;

/* `data`: the name of the history of its data. `former`: the one before, with how much of it there is. */
typedef struct {
    u8 data, former, former_end;
    Store store;
} Node;

/* `told`: what the lease is going to be; `expected`: what it must be until then. */
typedef struct {
    u8 step, node, data, has_slot, began, snapshot, due, connected;
    Record found, told, expected;
} Run;
enum { NO_RUN, SLOTS, READ, FIRST, INVALIDATE, LAST, MEASURE, COMMIT, TIME };

typedef struct {
    Node nodes[NODES];
    /* The earlier state of a node, and one, that is going to take over. */
    u8 older_of;
    Store older;
    u8 committed, place, roving;
    /* PostgreSQL's, by epoch: the writes that it was told of, and one; and the run. */
    u8 told[EPOCHS], confirmed[EPOCHS];
    Run run[RELAYS];
    /* The fill under way. */
    u8 filling, fill_epoch, fill_version;
    /* The newest `at` that readers have seen. */
    u8 looks[HISTORIES][EPOCHS];
    u8 fills, moves, rovings, fails, runs, histories;
} State;

/* -- the states that were seen ----------------------------------------------------------------------------------- */

static uint64_t *table, table_size, states;

static bool is_new(uint64_t hash)
{
    if (states * 3 >= table_size * 2) {
        uint64_t *old = table, old_size = table_size;
        table_size = old_size ? 2 * old_size : 1 << 16;
        table = calloc(table_size, sizeof *table);
        if (!table) {
            fprintf(stderr, "no memory for more than %" PRIu64 " states\n", states);
            exit(3);
        }
        states = 0;
        for (uint64_t i = 0; i < old_size; i++)
            if (old[i])
                is_new(old[i]);
        free(old);
    }
    uint64_t at = hash & (table_size - 1);
    for (; table[at]; at = (at + 1) & (table_size - 1))
        if (table[at] == hash)
            return false;
    table[at] = hash;
    states++;
    return true;
}

static uint64_t hashed(const State *s)
{
    uint64_t hash = 0, words[(sizeof *s + 7) / 8] = {0};
    memcpy(words, s, sizeof *s);
    for (size_t i = 0; i < sizeof words / 8; i++) {
        hash ^= words[i] * 0x9E3779B97F4A7C15u;
        hash = (hash << 27 | hash >> 37) * 0xC2B2AE3D27D4EB4Fu + 0x165667B19E3779F9u;
        hash ^= hash >> 29;
    }
    hash = (hash ^ hash >> 33) * 0xFF51AFD7ED558CCDu;
    hash = (hash ^ hash >> 33) * 0xC4CEB9FE1A85EC53u;
    return (hash ^ hash >> 33) | (hash == 0);
}

/* Gives epochs and runs new names, in the order in which they are found, and forgets those that nothing can name again. */
static void rename_all(State *s)
{
    if (memcmp(&s->run[0], &s->run[1], offsetof(Run, found)) < 0) {
        Run run = s->run[0];
        s->run[0] = s->run[1];
        s->run[1] = run;
    }
    Record *records[] = {
        &s->nodes[0].store.own, &s->nodes[0].store.roving, &s->nodes[1].store.own, &s->nodes[1].store.roving,
        &s->older.own, &s->older.roving,
        &s->run[0].found, &s->run[0].told, &s->run[0].expected, &s->run[1].found, &s->run[1].told, &s->run[1].expected,
    };
    u8 epochs[NAMES] = {0}, runs[NAMES] = {0}, epoch = 0, run = 0;
    for (size_t i = 0; i < sizeof records / sizeof *records; i++) {
        Record *record = records[i];
        if (!record->epoch)
            continue;
        if (!epochs[record->epoch])
            epochs[record->epoch] = ++epoch;
        record->epoch = epochs[record->epoch];
        if (!runs[record->run])
            runs[record->run] = ++run;
        record->run = runs[record->run];
        if (record->confirmed && !runs[record->confirmed])
            runs[record->confirmed] = ++run;
        record->confirmed = runs[record->confirmed];
    }
    u8 led = epoch;
    u8 *others[] = {&s->nodes[0].store.epoch, &s->nodes[1].store.epoch, &s->older.epoch, &s->fill_epoch};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (*others[i]) {
            if (!epochs[*others[i]])
                epochs[*others[i]] = ++epoch;
            *others[i] = epochs[*others[i]];
        }
    if (epoch >= EPOCHS || run >= NEW)
        abort();
    State old = *s;
    memset(s->told, 0, sizeof s->told);
    memset(s->confirmed, 0, sizeof s->confirmed);
    memset(s->looks, 0, sizeof s->looks);
    for (int i = 1; i < EPOCHS; i++) {
        u8 is = epochs[i];
        if (!is)
            continue;
        if (is <= led && (runs[old.confirmed[i]] || !RULE(CONFIRMED))) {
            s->told[is] = old.told[i];
            s->confirmed[is] = runs[old.confirmed[i]];
        }
        for (int n = 0; n < NODES; n++)
            s->looks[s->nodes[n].data][is] = old.looks[s->nodes[n].data][i];
    }
}

/* -- leases ------------------------------------------------------------------------------------------------------ */

static Record *lease(State *s, int node)
{
    Store *store = &s->nodes[node].store;
    return s->roving == node && (node == 0 || MOST(ADOPTS)) ? &store->roving : &store->own;
}

static bool same(const Record *one, const Record *other)
{
    return memcmp(one, other, sizeof *one) == 0;
}

static bool is_of(const Record *record, const Node *node)
{
    if (!MOST(CLUSTER) || record->data == node->data)
        return true;
    if (record->data != node->former)
        return false;
    if (!record->length)
        return !RULE(KNOWN_LENGTH);
    return record->length <= node->former_end || !RULE(LONG_ENOUGH);
}

static bool is_valid(State *s, int node)
{
    const Record *record = lease(s, node);
    return record->epoch && record->at && (is_of(record, &s->nodes[node]) || !RULE(OF_DATA));
}

/* -- the steps --------------------------------------------------------------------------------------------------- */

static const char *path[DEEPEST];
static int depth;

static void go_on(const State *s);

static void reached(State *s, const char *event)
{
    path[depth++] = event;
    if (depth == DEEPEST)
        abort();
    /* All readers look, and read. */
    for (int n = 0; n < NODES; n++) {
        const Record *record = lease(s, n);
        if (is_valid(s, n) && (record->covers || !RULE(USED)) && s->looks[s->nodes[n].data][record->epoch] < record->at)
            s->looks[s->nodes[n].data][record->epoch] = record->at;
    }
    const Node *node = &s->nodes[s->place];
    if (node->store.version && node->store.version < s->looks[node->data][node->store.epoch]) {
        for (int i = 0; i < depth; i++)
            puts(path[i]);
        printf("a stale hit, after %" PRIu64 " states\n", states);
        exit(1);
    }
    rename_all(s);
    if (is_new(hashed(s)))
        go_on(s);
    depth--;
}

static void moves(const State *s)
{
    State then = *s;
    if (s->moves < MOST(MOVES)) {
        Store *source = &then.nodes[s->place].store, *target = &then.nodes[!s->place].store;
        /* A key without a value does not move; the other node may have a value from before. */
        if (source->version) {
            target->version = source->version;
            target->epoch = source->epoch;
        }
        target->fill |= source->fill;
        source->version = source->epoch = source->fill = 0;
        then.place = !s->place;
        then.moves++;
        reached(&then, "the key's slot moves");
    }
    then = *s;
    if (s->rovings < MOST(ROVINGS)) {
        Record *source = &then.nodes[s->roving].store.roving, *target = &then.nodes[!s->roving].store.roving;
        if (source->epoch)
            *target = *source;
        memset(source, 0, sizeof *source);
        then.roving = !s->roving;
        then.rovings++;
        reached(&then, "the slot of the first node's lease moves");
    }
}

static void failures(const State *s)
{
    if (s->fails == MOST(FAILS))
        return;
    State then = *s;
    if (s->older_of) {
        Node *node = &then.nodes[s->older_of - 1];
        node->former = node->data;
        node->former_end = s->older.length;
        node->data = ++then.histories;
        node->store = s->older;
        then.older_of = 0;
        memset(&then.older, 0, sizeof then.older);
        then.fails++;
        reached(&then, s->older_of == 1 ? "a replica takes over the first node" : "a replica takes over the second node");
        return;
    }
    for (int n = 0; n < (MOST(CLUSTER) ? NODES : 1); n++) {
        then = *s;
        then.older_of = n + 1;
        then.older = s->nodes[n].store;
        reached(&then, n == 0 ? "the first node's replica stays behind" : "the second node's replica stays behind");
    }
}

/* A relay that died is one that another's run replaces. */
static void begins(const State *s, int r)
{
    for (int n = 0; n < MOST(RELAYING) && s->runs < MOST(RUNS); n++) {
        State then = *s;
        Run *run = &then.run[r];
        const Node *node = &s->nodes[n];
        memset(run, 0, sizeof *run);
        run->step = SLOTS;
        run->node = n;
        run->expected = *lease(&then, n);
        if (run->expected.epoch && (is_of(&run->expected, node) || !RULE(GOES_ON)))
            run->found = run->expected;
        run->data = node->data;
        run->began = s->committed;
        then.runs++;
        reached(&then, n == 0 ? "a relay reads the first node's lease" : "a relay reads the second node's lease");
    }
}

/* PostgreSQL's snapshot: does the run go on with the epoch, and what has it to tell? */
static void decide(State *s, Run *run)
{
    const Record found = run->found;
    run->step = FIRST;
    run->snapshot = s->committed;
    run->told = found;
    run->told.run = NEW;
    run->told.data = run->data;
    run->told.length = 0;
    run->told.covers = run->has_slot;
    bool known = found.epoch && s->confirmed[found.epoch] &&
                 (s->confirmed[found.epoch] == found.run || s->confirmed[found.epoch] == found.confirmed);
    bool returned = run->has_slot && !found.covers && found.left;
    if (!found.epoch || (!known && RULE(CONFIRMED)) || (returned && RULE(COMES_BACK))) {
        run->told.epoch = NEW;
        run->told.confirmed = run->told.at = run->told.left = 0;
    } else {
        run->told.confirmed = s->confirmed[found.epoch];
        run->told.left = (found.left || found.covers) && !run->has_slot;
        run->due = run->has_slot && s->committed + 1 > s->told[found.epoch];
    }
    memset(&run->found, 0, sizeof run->found);
    run->has_slot = 0;
}

static void write_lease(State *s, Run *run, bool is_told)
{
    *lease(s, run->node) = run->told;
    s->nodes[run->node].store.length += is_told;
}

static void relay(const State *s, int r)
{
    State then = *s;
    Run *run = &then.run[r];
    Node *node = &then.nodes[run->node];
    switch (run->step) {
    case SLOTS:
        run->has_slot = !MOST(CLUSTER) || s->place == run->node;
        run->step = READ;
        reached(&then, "a relay reads which slots its node has");
        break;
    case READ:
        decide(&then, run);
        reached(&then, "a relay reads PostgreSQL");
        break;
    case FIRST:
        if (!same(lease(&then, run->node), &run->expected) && RULE(AS_READ))
            break;
        write_lease(&then, run, !run->due);
        run->connected = run->due ? node->data : 0;
        run->step = run->due ? INVALIDATE : MEASURE;
        memset(&run->expected, 0, sizeof run->expected);
        reached(&then, run->due ? "a relay writes its first number" : "a relay writes its number");
        break;
    case INVALIDATE:
        /* It was sent with the first number, over one connection. */
        if (node->data != run->connected)
            break;
        if (s->place == run->node)
            node->store.version = node->store.epoch = node->store.fill = 0;
        else if (RULE(REDIRECTED))
            break;
        run->due = 0;
        run->step = RULE(LAST_NUMBER) ? LAST : MEASURE;
        reached(&then, "a relay invalidates the value");
        break;
    case LAST:
        if (!same(lease(&then, run->node), &run->told) && RULE(FIRST_NUMBER))
            break;
        run->told.run = NEW;
        write_lease(&then, run, true);
        if (node->data != run->connected && RULE(CONNECTED)) {
            memset(run, 0, sizeof *run);
            reached(&then, "a relay writes its last number over a new connection");
            break;
        }
        run->connected = 0;
        run->step = MEASURE;
        reached(&then, "a relay writes its last number");
        break;
    case MEASURE:
        if (MOST(CLUSTER) && node->data != run->data)
            break;
        run->expected = run->told;
        run->told.at = run->began + 1;
        run->told.length = MOST(CLUSTER) ? node->store.length : 0;
        run->data = run->began = run->connected = 0;
        run->step = COMMIT;
        reached(&then, "a relay measures its node's data");
        break;
    case COMMIT:
        then.told[run->told.epoch] = run->snapshot + 1;
        then.confirmed[run->told.epoch] = run->told.run;
        if (!RULE(BEFORE))
            run->told.at = s->committed + 1;
        run->snapshot = 0;
        run->step = TIME;
        reached(&then, "a relay commits to PostgreSQL");
        break;
    case TIME:
        if (same(lease(&then, run->node), &run->expected) || !RULE(STILL_TOLD)) {
            write_lease(&then, run, false);
            memset(run, 0, sizeof *run);
            reached(&then, "a relay makes its lease valid");
        }
    }
}

static void filler(const State *s)
{
    State then = *s;
    Store *store = &then.nodes[s->place].store;
    if (s->filling) {
        if (store->fill) {
            store->version = s->fill_version;
            store->epoch = s->fill_epoch;
            store->fill = 0;
        }
        then.filling = then.fill_epoch = then.fill_version = 0;
        reached(&then, "a reader stores the value");
    } else if (s->fills < MOST(FILLS)) {
        const Record *record = lease(&then, s->place);
        if (!is_valid(&then, s->place) || (!record->covers && RULE(STORED)))
            return;
        /* It is loaded at once: what is loaded later is only newer. */
        then.filling = store->fill = 1;
        then.fill_epoch = record->epoch;
        then.fill_version = s->committed + 1;
        then.fills++;
        reached(&then, "a reader loads the value");
    }
}

static void go_on(const State *s)
{
    State then = *s;
    if (s->committed < MOST(WRITES)) {
        then.committed++;
        reached(&then, "a write is committed");
    }
    for (int r = 0; r < MOST(AT_ONCE); r++) {
        if (s->run[r].step)
            relay(s, r);
        begins(s, r);
    }
    filler(s);
    moves(s);
    failures(s);
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        bool known = false;
        for (int b = 0; b < BOUNDS; b++) {
            size_t length = strlen(bounds[b].name);
            if (!strncmp(argv[i], bounds[b].name, length) && argv[i][length] == '=') {
                bounds[b].most = atoi(argv[i] + length + 1);
                known = true;
            }
        }
        for (int r = 0; r < RULES; r++)
            if (!strcmp(argv[i], rules[r])) {
                without = r;
                known = true;
            }
        if (!known) {
            fprintf(stderr, "neither a bound nor a rule: %s\n", argv[i]);
            return 2;
        }
    }
    State s = {.nodes = {{.data = 1, .store = {.length = 1}}, {.data = 2, .store = {.length = 1}}}, .histories = 2};
    reached(&s, "it begins");
    printf("%" PRIu64 " states, and no stale hit\n", states);
    return 0;
}
