// How figures are written for people: the twin of ui/numbers.py; both pass tests/number_cases.json.
// null and undefined are missing and become "–", never 0. The feed sends NaN and infinity as words.
"use strict";
window.signalbox = window.signalbox || {};
window.signalbox.numbers = (() => {
  const MISSING = "–";
  const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
  const WORDS = { nan: NaN, inf: Infinity, "-inf": -Infinity };

  // the number behind a value off the wire, or null when there is none
  const number = (value) => (value === null || value === undefined ? null : Object.hasOwn(WORDS, value) ? WORDS[value] : Number(value));
  // applies `write` to a finite figure; says the others by name
  const finite = (write) => (raw, ...more) => {
    const value = number(raw);
    if (value === null) return MISSING;
    if (Number.isNaN(value)) return "NaN";
    if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
    return write(value, ...more);
  };
  const fixed = (value, places) => {
    const text = value.toFixed(places);
    return Number(text) === 0 ? text.replace("-", "") : text;
  };
  const grouped = (digits) => {
    const [whole, rest] = digits.split(".");
    return whole.replace(/\B(?=(\d{3})+$)/g, ",") + (rest === undefined ? "" : "." + rest);
  };
  const exponent = (value, digits) => value.toExponential(digits - 1).replace("e+", "e");
  const significant = (value, digits) => {
    const power = Number(value.toExponential(digits - 1).split("e")[1]);
    return fixed(value, Math.max(digits - 1 - power, 0));
  };
  const two = (large, largeUnit, small, smallUnit) => `${large} ${largeUnit}` + (small ? ` ${small} ${smallUnit}` : "");

  const memory = finite((gib) => {
    if (Math.abs(gib) >= 1) return `${fixed(gib, 1)} GiB`;
    const mib = fixed(gib * 1024, 0);
    return mib === "1024" ? "1.0 GiB" : `${mib} MiB`;
  });
  const disk = finite((bytes) => {
    if (bytes < 1000) return `${fixed(bytes, 0)} bytes`;
    for (const [unit, scale] of [["kB", 1e3], ["MB", 1e6], ["GB", 1e9]]) {
      const value = bytes / scale;
      if (unit === "GB" || Number(fixed(value, 0)) < 1000)
        return `${value < 99.95 ? fixed(value, 1) : grouped(fixed(value, 0))} ${unit}`;
    }
  });
  const loss = finite((value) => {
    if (value === 0 || Math.abs(value) >= 0.1) return fixed(value, 3);
    return Math.abs(value) >= 1e-4 ? significant(value, 3) : exponent(value, 2);
  });
  const rate = finite((value) => {
    if (value === 0) return "0";
    const [mantissa, power] = (Math.abs(value) >= 0.01 ? significant(value, 2) : exponent(value, 2)).split("e");
    const short = mantissa.includes(".") ? mantissa.replace(/\.?0+$/, "") : mantissa;
    return power === undefined ? short : `${short}e${power}`;
  });
  const grad_norm = finite((value) => (Math.abs(value) < 1e6 ? fixed(value, 2) : exponent(value, 2)));
  const count = finite((value) => {
    if (Math.abs(value) < 999999.5) return grouped(fixed(value, 0));
    const [unit, scale] = Math.abs(value) < 999.5e6 ? ["M", 1e6] : ["B", 1e9];
    const short = value / scale;
    const places = Math.abs(short) < 9.995 ? 2 : Math.abs(short) < 99.95 ? 1 : 0;
    return `${grouped(fixed(short, places))} ${unit}`;
  });
  const percent = (rawPart, rawWhole = 1) => {
    const part = number(rawPart), whole = number(rawWhole);
    if (part === null || !whole) return MISSING;
    return finite((share) => {
      if (share > 0 && share < 1) return "under 1 %";
      return `${fixed(part < whole ? Math.min(share, 99) : share, 0)} %`;
    })((part / whole) * 100);
  };
  const speed = finite((tokens) =>
    tokens < 99999.5 ? `${grouped(fixed(tokens, 0))} tok/s` : `${grouped(fixed(tokens / 1000, 0))}k tok/s`);
  const duration = finite((seconds) => {
    if (seconds < 0.5) return "under 1 s";
    const whole = Number(fixed(seconds, 0));
    if (whole < 60) return `${whole} s`;
    if (whole < 600) return two(Math.floor(whole / 60), "min", whole % 60, "s");
    const minutes = Number(fixed(seconds / 60, 0));
    if (minutes < 60) return `${minutes} min`;
    if (minutes < 1440) return two(Math.floor(minutes / 60), "h", minutes % 60, "min");
    const hours = Number(fixed(seconds / 3600, 0));
    return two(Math.floor(hours / 24), "d", hours % 24, "h");
  });
  const pad = (value) => String(value).padStart(2, "0");
  const eta = (remaining, step) => {
    const value = number(remaining);
    return step < 20 || value === null || !Number.isFinite(value) ? "estimating" : `about ${duration(value)}`;
  };
  const when = (atSeconds, nowSeconds) => {
    if (atSeconds === null || atSeconds === undefined) return MISSING;
    const passed = nowSeconds - atSeconds;
    if (passed >= 0 && passed < 60) return "just now";
    if (passed >= 60 && passed < 3600) return `${Math.floor(passed / 60)} min ago`;
    const at = new Date(atSeconds * 1000), now = new Date(nowSeconds * 1000);
    const hour = `${pad(at.getHours())}:${pad(at.getMinutes())}`;
    if (at.toDateString() === now.toDateString()) return hour;
    const year = at.getFullYear() === now.getFullYear() ? "" : ` ${at.getFullYear()}`;
    return `${at.getDate()} ${MONTHS[at.getMonth()]}${year} ${hour}`;
  };
  return { number, memory, disk, loss, rate, grad_norm, count, percent, speed, duration, eta, when };
})();
