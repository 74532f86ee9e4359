"""Secure sums: masks cancel, the server learns nothing else, and what it could ask for to learn more is refused."""

import itertools

import numpy as np
import pytest

pytest.importorskip("cryptography", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")
pytest.importorskip("Crypto", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")
pytest.importorskip("msgpack", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")

import msgpack
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from scipy import stats
from secure_trial import FORM, PLAN, Sum, ca, pair, plain_sum, summand

from fedmetanas_jax.deploy import masks, session, signatures, unmask, vector
from fedmetanas_jax.deploy.member import Distrust
from fedmetanas_jax.deploy.opened import Opened
from fedmetanas_jax.deploy.signatures import Authority, Signer, Unproven
from fedmetanas_jax.engine.secure import Summand
from fedmetanas_jax.options import UsageError


def same(one: vector.Vector, other: vector.Vector) -> None:
    np.testing.assert_array_equal(one.narrow, other.narrow)
    assert one.wide == other.wide


def distrust(function, *given) -> str:
    with pytest.raises(Distrust) as caught:
        function(*given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def done(folder, clients: int, dead_early=(), dead_late=(), silent=(), **how) -> tuple[Sum, vector.Vector]:
    """A sum in which some die before their summand, some right after it, and some before they open."""
    one = Sum(folder, clients, **how)
    one.meet()
    one.mask(range(clients))
    survivors = [place for place in range(clients) if place not in dead_early]
    for place in dead_early:
        del one.masked[place]
    listed = session.pack([(place,) for place in survivors])
    one.survivors = survivors
    one.signed = [(place, one.members[place].sign(listed)) for place in survivors if place not in dead_late]
    return one, one.open([place for place, _ in one.signed if place not in silent])


# --- What comes out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clients", "early", "late", "silent"),
    [(3, (), (), ()), (5, (), (), ()), (5, (2,), (), ()), (7, (0, 6), (), ()), (7, (), (3, 5), ()), (7, (1,), (4,), ()),
     (7, (), (), (0, 1)), (10, (3,), (7,), (9,))],
)  # fmt: skip
def test_the_sum_is_that_of_those_whose_summands_came_whoever_dies(tmp_path, clients, early, late, silent):
    _, total = done(tmp_path, clients, early, late, silent)
    same(total, plain_sum(place for place in range(clients) if place not in early))


def test_with_too_few_clients_there_is_no_sum(tmp_path):
    """Of seven five must take part in every exchange."""
    assert [session.threshold(size) for size in (3, 4, 5, 6, 7, 10, 30)] == [3, 3, 4, 5, 5, 7, 21]
    one = Sum(tmp_path, 7)
    one.meet()
    assert "there are shares of 4 clients" in distrust(one.members[0].mask, one.for_client(0, range(4)))
    one = Sum(tmp_path, 7)
    one.meet()
    one.mask(range(7))
    few = session.pack([(place,) for place in range(4)])
    assert "there are summands of 4 clients; a sum takes those of 5" in distrust(one.members[0].sign, few)
    one = Sum(tmp_path, 7)
    one.meet()
    one.mask(range(7))
    one.sign(range(7))
    one.signed = one.signed[:4]
    assert "there are signatures of 4 clients" in distrust(one.open, range(5))
    small = Sum(tmp_path, 4, cohort=7)
    small.table = {place: member.keys() for place, member in small.members.items()}
    keys = session.pack(list(small.table.values()))
    assert "there are keys of 4 clients" in distrust(small.members[0].share, keys)


def test_shares_that_were_changed_are_noticed_by_name_of_the_secret(tmp_path):
    one = Sum(tmp_path, 4)
    one.meet()
    one.mask(range(4))
    one.sign(range(3))
    given = {}
    for place in range(3):
        row = bytearray(one.members[place].open(session.pack(one.signed)))
        if place == 1:
            row[16 * 2] ^= 1  # its share of client 2's secret
            row[16 * 3] ^= 1  # and of the one that is gone
        given[place] = {of: bytes(row[16 * n : 16 * n + 16]) for n, of in enumerate(one.sharers)}
    summands = {place: one.masked[place] for place in range(3)}
    with pytest.raises(unmask.Failed, match="the shares of client 2's secret make another one"):
        unmask.unmask(one.which, FORM, one.table, one.sharers, summands, given)
    given[1][2] = bytes([given[1][2][0] ^ 1]) + given[1][2][1:]
    with pytest.raises(unmask.Failed, match="the shares of client 3's secret make another one"):
        unmask.unmask(one.which, FORM, one.table, one.sharers, summands, given)


# --- What does not come out --------------------------------------------------------------------------------


def test_any_t_shares_rebuild_a_secret_and_fewer_do_not():
    secret = masks.new_secret()
    shares = dict(enumerate(masks.split(secret, 3, 5)))
    for some in itertools.combinations(range(5), 3):
        assert masks.rebuilt({holder: shares[holder] for holder in some}) == secret
    assert masks.rebuilt(shares) == secret
    for some in itertools.combinations(range(5), 2):
        assert masks.rebuilt({holder: shares[holder] for holder in some}) != secret
    # Two shares fit any secret: for each there is a third share that makes it, so they tell nothing.
    other = masks.split(bytes(16), 3, 5)
    assert len({*shares.values(), *other}) == 10


def test_a_masked_summand_is_uniform_and_tells_nothing_of_the_change(tmp_path):
    """Of a change of zeros and of one that grows along its 20,000 numbers: bytes pass a chi-squared test of uniformity,
    and what is sent is no more like the change than chance."""
    form = vector.Form({"params": np.zeros(20_000, np.float32)}, ("rows",))
    words, zeros = form.words(), vector.Vector(np.zeros(form.words(), np.uint32), [0])
    ramp = vector.Vector(np.arange(words, dtype=np.uint32) * np.uint32(2**31 // words), [5])
    found = []
    for added in (zeros, ramp, ramp):
        one = Sum(tmp_path, 3, form=form)
        one.members[1] = one.member(tmp_path, 1, vector.Vector(added.narrow.copy(), list(added.wide)))
        one.meet()
        one.mask(range(3))
        found.append(one.masked[1])
    for masked in found:
        counts = np.bincount(masked.narrow.view(np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
        likeness = np.corrcoef(masked.narrow.astype(float), ramp.narrow.astype(float))[0, 1]
        assert abs(likeness) < 6 / np.sqrt(words)
        assert masked.wide[0] > 2**64  # of 2^128 that is missed once in 2^64
    assert np.mean(found[1].narrow == found[2].narrow) < 0.001  # the same change twice looks like another one


def test_what_a_server_sees_of_a_client_before_the_others_open_is_masked_by_all_of_them(tmp_path):
    """Take any one of its masks away, the one that is its own or that with another client, and nothing is seen."""
    one = Sum(tmp_path, 3)
    one.meet()
    one.mask(range(3))
    member, name = one.members[0], one.which.name()
    keys = {0: masks.self_key(member._self, name)} | {place: member._pair_key(place) for place in (1, 2)}
    for hidden in range(3):
        seen = vector.Vector(one.masked[0].narrow.copy(), list(one.masked[0].wide))
        for place in {0, 1, 2} - {hidden}:
            vector.add(seen, masks.mask(keys[place], FORM), -1)
        assert np.mean(seen.narrow == summand(0).narrow) < 0.05
    whole = vector.Vector(one.masked[0].narrow.copy(), list(one.masked[0].wide))
    for key in keys.values():
        vector.add(whole, masks.mask(key, FORM), -1)
    same(whole, summand(0))


def test_keys_serve_once(tmp_path):
    """Every attempt has keys of its own, and what is derived is bound to run, round, attempt and purpose."""
    tables = []
    for attempt in (1, 2):
        one = Sum(tmp_path, 3, attempt=attempt)
        one.meet()
        tables += [key for row in one.table.values() for key in row[2:5]]
    assert len(set(tables)) == 18
    names = {session.Session(*of).name() for of in itertools.product("ab", (1, 2), (1, 2), (3, 4), "xy")}
    assert len(names) == 32
    assert session.message_of("ab", b"c") != session.message_of("a", b"bc")
    secret = masks.new_secret()
    assert len({masks.derived(secret, *about) for about in (("a", 1), ("a", 2), ("b", 1), ("a", b"1"))}) == 4
    mine, other = masks.private_of(secret, b"s"), masks.private_of(masks.new_secret(), b"s")
    to, back = (mine, masks.public_of(other)), (other, masks.public_of(mine))
    assert masks.pair_key(*to, b"s", 4, 9) == masks.pair_key(*back, b"s", 9, 4) != masks.pair_key(*to, b"t", 4, 9)


# --- A server that does not keep to the rules --------------------------------------------------------------


def test_a_key_that_was_swapped_is_refused(tmp_path):
    def met(change) -> str:
        one = Sum(tmp_path, 3)
        one.table = {place: member.keys() for place, member in one.members.items()}
        return distrust(one.members[0].share, session.pack(change(dict(one.table)).values()))

    def swapped(**changed):
        return met(lambda table: table | {1: table[1]._replace(**changed)})

    evil = masks.public_of(masks.private_of(masks.new_secret(), b"evil"))
    assert "the keys that are said to be client-1's are not" in swapped(mask_key=evil)
    assert "the keys that are said to be client-1's are not" in swapped(cipher_key=evil)
    assert "the keys that are said to be client-1's are not" in swapped(commitment=bytes(32))
    assert "has not this client's own" in met(lambda table: table | {0: table[0]._replace(mask_key=evil)})
    assert "has not this client's own" in met(lambda table: {place: table[place] for place in (1, 2)})
    # Somebody with a certificate of another CA, of the server's, one that has expired, or twice the same client.
    for bad, said in (
        (pair("client-9", "other ca"), "is not signed by the federation's CA itself"),
        (pair("server", use=ExtendedKeyUsageOID.SERVER_AUTH), "is not marked as a client's"),
        (pair("client-9", days=-1.0), "is not valid now"),
    ):
        der = signatures.x509.load_pem_x509_certificate(bad.certificate)
        encoded = der.public_bytes(signatures.serialization.Encoding.DER)
        assert f"the certificate of client 1 {said}" in swapped(certificate=encoded)
    assert "is no certificate" in swapped(certificate=b"x")
    twice = met(lambda table: table | {1: table[2]._replace(place=1)})
    assert "has a name twice" in twice
    # Keys of another round, or of another attempt.
    old = Sum(tmp_path, 3, attempt=2)
    stale = {place: member.keys() for place, member in old.members.items()}
    assert "the keys that are said to be client-2's are not" in met(lambda table: table | {2: stale[2]})


def test_clients_that_were_sent_different_models_have_no_sum(tmp_path):
    one = Sum(tmp_path, 3)
    one.which = one.which._replace(message=session.message_of(PLAN, b"another message"))
    one.members[2] = one.member(tmp_path, 2)
    keys = session.pack([member.keys() for member in one.members.values()])
    assert "client-2's are not: it did not sign this, or was sent another" in distrust(one.members[0].share, keys)
    assert "client-0's are not: it did not sign this, or was sent another" in distrust(one.members[2].share, keys)


def test_nothing_is_answered_twice_or_out_of_order(tmp_path):
    one = Sum(tmp_path, 3)
    one.meet()
    assert "'share' is not what comes now" in distrust(one.members[0].share, one.keys)
    # After that it takes no part at all.
    assert "'mask' is not what comes now" in distrust(one.members[0].mask, one.for_client(0, range(3)))
    one = Sum(tmp_path, 3)
    one.meet()
    assert "'open' is not what comes now" in distrust(one.members[0].open, session.pack([]))


def test_both_kinds_of_share_of_a_client_are_not_given(tmp_path):
    """A second opening with another list would need a second signature."""
    one = Sum(tmp_path, 4)
    one.meet()
    one.mask(range(4))
    one.sign(range(4))
    member, signed = one.members[0], session.pack(one.signed)
    first = member.open(signed)
    assert len(first) == 4 * 16
    assert "'sign' is not what comes now" in distrust(member.sign, session.pack([(0,), (1,), (2,)]))
    assert "'open' is not what comes now" in distrust(member.open, signed)
    assert member._shares == {}


def test_survivors_that_differ_between_clients_are_noticed(tmp_path):
    """The server tells clients 0 and 1 that 3 is gone, and clients 2 and 3 that it is not."""
    one = Sum(tmp_path, 4)
    one.meet()
    one.mask(range(4))
    lists = {place: [0, 1, 2] if place < 2 else [0, 1, 2, 3] for place in range(4)}
    signed = [(place, one.members[place].sign(session.pack([(of,) for of in lists[place]]))) for place in range(4)]
    assert "client-2 did not sign what this client was told" in distrust(one.members[0].open, session.pack(signed[:3]))
    assert "client-0 did not sign what this client was told" in distrust(one.members[3].open, session.pack(signed))


def test_keys_and_sharers_that_differ_between_clients_are_noticed(tmp_path):
    """Keys that a client made in an earlier attempt are not signed for this one, but lists can be cut."""
    one = Sum(tmp_path, 4)
    one.table = {place: member.keys() for place, member in one.members.items()}
    one.keys = session.pack(list(one.table.values()))
    cut = session.pack([one.table[place] for place in range(3)])
    one.shares = {place: one.shared(place, cut if place < 3 else None) for place in range(4)}
    for place in range(3):
        one.shares[place][3] = bytes(masks.SEALED)
    # Client 3, who alone was told of itself, is given shares that were not made for it.
    assert "the share that client-0 made for it was not sealed for it" in distrust(
        one.members[3].mask, one.for_client(3, range(4))
    )
    one = Sum(tmp_path, 4)
    one.meet()
    one.masked = {place: one.members[place].mask(one.for_client(place, range(4 if place else 3))) for place in range(4)}
    one.sharers = [0, 1, 2, 3]
    one.sign([0, 1, 2])
    assert "client-0 did not sign what this client was told" in distrust(one.members[1].open, session.pack(one.signed))


def test_survivors_that_can_be_none_are_refused(tmp_path):
    def asked(survivors, sharers=range(4)) -> str:
        one = Sum(tmp_path, 5)
        one.meet()
        one.members[0].mask(one.for_client(0, sharers))
        return distrust(one.members[0].sign, session.pack([(place,) for place in survivors]))

    assert "not among those it made its masks with" in asked([0, 1, 2, 4])
    assert "not among those it made its masks with" in asked([1, 2, 3, 4], range(5))


def test_a_round_is_opened_once_or_over_the_same_clients(tmp_path):
    """Two sums that differ by one client would tell its change, which is the same when it is asked again."""
    done(tmp_path, 4)
    again = Sum(tmp_path, 4, attempt=2)
    again.meet()
    again.mask(range(4))
    fewer = session.pack([(place,) for place in range(3)])
    assert "it has opened a sum of round 1 over other clients already" in distrust(again.members[0].sign, fewer)
    _, total = done(tmp_path, 4, attempt=3)  # a server that was killed before it kept the sum
    same(total, plain_sum(range(4)))
    done(tmp_path, 4, round=2)
    earlier = Sum(tmp_path, 4)
    earlier.meet()
    earlier.mask(range(4))
    everybody = session.pack([(place,) for place in range(4)])
    said = distrust(earlier.members[1].sign, everybody)
    assert "it has opened the sum of round 2, and opens none of an earlier" in said
    (tmp_path / "broken.json").write_text("{")
    assert "cannot be read" in Opened(tmp_path / "broken.json").other(1, [])


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"\xc1", "no msgpack"),
        (msgpack.packb({"a": 1}), "none, or too long"),
        (session.pack([(place,) for place in range(9)]), "none, or too long"),
        (session.pack([(1, 2)]), "a row that is none"),
        (session.pack([("1",)]), "another type or size"),
        (session.pack([(-1,)]), "another type or size"),
        (session.pack([(True,)]), "another type or size"),
        (session.pack([(1,), (0,)]), "not in order"),
        (session.pack([(1,), (1,)]), "there twice"),
    ],
)
def test_a_list_that_is_none_is_told(tmp_path, payload, said):
    with pytest.raises(ValueError, match=said):
        session.unpack(payload, session.SURVIVORS, 4)
    one = Sum(tmp_path, 4)
    one.meet()
    one.mask(range(4))
    assert said in distrust(one.members[0].sign, payload)


# --- Parts -------------------------------------------------------------------------------------------------


def test_what_is_sealed_opens_for_one_alone():
    key, other = masks.derived(b"a" * 16, "x"), masks.derived(b"b" * 16, "x")
    sealed = masks.seal(key, bytes(32), b"session")
    assert len(sealed) == masks.SEALED
    assert masks.unseal(key, sealed, b"session") == bytes(32)
    for wrong in ((other, sealed, b"session"), (key, sealed, b"another"), (key, bytes(masks.SEALED), b"session")):
        with pytest.raises(ValueError, match="was not sealed for it"):
            masks.unseal(*wrong)
    # A point of small order would make a key that everybody knows.
    with pytest.raises(ValueError, match="shared key"):
        masks.agreed(masks.new_key(), bytes(32), "x")


@pytest.mark.parametrize("kind", ["curve", "rsa"])
def test_who_has_the_key_of_a_certificate_signs_and_nobody_else(kind):
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else None
    signer = Signer(pair("client-1", key=key))
    assert signer.name == Authority(ca()).name(signer.certificate) == "client-1"
    signature = signer.sign(b"text")
    assert len(signature) <= signatures.MOST_SIGNATURE
    signatures.check(signer.certificate, signature, b"text")
    for certificate, text in ((signer.certificate, b"other"), (Signer(pair("client-2")).certificate, b"text")):
        with pytest.raises(Unproven, match="did not sign this"):
            signatures.check(certificate, signature, text)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_a_certificate_that_was_damaged_anywhere_is_none_or_says_the_same():
    """Beside what the CA signed there is a count of unused bits that may differ."""
    authority, sound = Authority(ca()), Signer(pair("client-1")).certificate
    said, refused = signatures.x509.load_der_x509_certificate(sound).tbs_certificate_bytes, 0
    for place in range(len(sound)):
        hit = bytearray(sound)
        hit[place] ^= 1 << place % 8
        try:
            authority.name(bytes(hit))
        except Unproven:
            refused += 1
        else:
            assert signatures.x509.load_der_x509_certificate(bytes(hit)).tbs_certificate_bytes == said
    assert refused >= len(sound) - 1


def test_certificates_that_others_would_not_take_are_refused_at_the_door():
    with pytest.raises(UsageError, match="with an elliptic curve or RSA key"):
        Signer(pair("client-1", key=ed25519.Ed25519PrivateKey.generate()))
    with pytest.raises(UsageError, match="is not signed by the federation's CA itself"):
        Signer(pair("client-1", "other ca"))


def test_vectors_cross_the_wire_and_hold_what_records_need():
    change = {"params": np.arange(200, dtype=np.int32).reshape(40, 5) - 100, "alpha": np.full(6, -(2**30), np.int32)}
    metrics = {"loss": np.float32(1.7)}
    numbers = vector.figures(FORM.names, 7.0, metrics, 1.0, 3)
    one = FORM.of(Summand(change, np.int32(9)), numbers)
    row = vector.pack(one)
    assert len(row) == FORM.size() == 4 * (200 + 6 + 1) + 16 * 3
    same(FORM.unpack(row), one)
    with pytest.raises(ValueError, match="bytes where a client adds"):
        FORM.unpack(row[:-1])
    two = FORM.of(Summand(change, np.int32(2)), vector.figures(FORM.names, 3.0, {"loss": np.float32(0.3)}, 0.0, 3))
    vector.add(one, two, 1)
    summed = FORM.summand(one)
    np.testing.assert_array_equal(summed.change["params"], 2 * change["params"])
    assert summed.change["alpha"].tolist() == [-(2**31)] * 6
    assert summed.weight == 11
    found = vector.sums(FORM.names, one.wide)
    loss = 7 * float(np.float32(1.7)) + 3 * float(np.float32(0.3))  # to the bit
    assert found == {"rows": 10.0, "loss": loss, "clipped": 1.0}
    assert vector.sums(("loss",), vector.figures(("loss",), 2.0, {"loss": -0.5}, 0.0, 3)) == {"loss": -1.0}
    with pytest.raises(ValueError, match="its loss is too large for a sum"):
        vector.figures(("loss",), 1.0, {"loss": 1e30}, 0.0, 3)
    assert FORM.digest() != FORM._replace(names=("rows", "loss")).digest()
