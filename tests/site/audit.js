// What a page holds and looks like, to one who reads it: evaluated in the page, returns plain data.
() => {
  const visible = (element) =>
    element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) &&
    element.getClientRects().length > 0;
  const tell = (element) => {
    const classes = [...element.classList].map((name) => "." + name).join("");
    const text = element.textContent.trim().replace(/\s+/g, " ").slice(0, 40);
    return `${element.tagName.toLowerCase()}${classes} "${text}"`;
  };

  // Colours are [red, green, blue, alpha], of 255, 255, 255 and 1.
  const parse = (color) => {
    const numbers = color.match(/[\d.]+(e-?\d+)?/g).map(Number);
    const [r, g, b, alpha = 1] = numbers;
    if (color.startsWith("rgb")) return [r, g, b, alpha];
    if (color.startsWith("color(srgb ")) return [r * 255, g * 255, b * 255, alpha];
    throw new Error(`a colour that this does not read: ${color}`);
  };
  const over = (top, below) =>
    [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const ancestors = (element) =>
    element ? [...ancestors(element.parentElement), element] : [];
  const backdrop = (element) =>
    ancestors(element).reduce(
      (below, e) => over(parse(getComputedStyle(e).backgroundColor), below),
      [255, 255, 255, 1],
    );
  const luminance = (color) => {
    const [r, g, b] = color.slice(0, 3).map((c) => {
      const s = c / 255;
      return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (element) => {
    const below = backdrop(element);
    const color = parse(getComputedStyle(element).color);
    for (const e of ancestors(element)) color[3] *= Number(getComputedStyle(e).opacity);
    const [dark, light] = [over(color, below), below].map(luminance).sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  // WCAG 2: 4.5, and 3 for letters of 24 pixels, or bold ones of 14 points.
  const wanted = (element) => {
    const style = getComputedStyle(element);
    const size = parseFloat(style.fontSize);
    return size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
  };
  const faint = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("script, style, noscript")) continue;
    if (!visible(element)) continue;
    const ratio = contrast(element);
    if (ratio < wanted(element)) faint.set(tell(element), ratio);
  }

  // What sticks out of the window is out of reach, unless something around it scrolls.
  const scrolls = (element) => {
    for (let e = element.parentElement; e && e !== document.body; e = e.parentElement) {
      if (["auto", "scroll"].includes(getComputedStyle(e).overflowX)) return true;
    }
    return false;
  };
  const outside = [...document.querySelectorAll(".md-content *")].filter((e) => {
    const box = e.getBoundingClientRect();
    return visible(e) && box.width > 0 && box.right > innerWidth + 1 && !scrolls(e);
  });

  const named = (e) =>
    e.textContent.trim() || e.getAttribute("aria-label") || e.title || e.querySelector("img[alt]");
  const controls = [...document.querySelectorAll("a[href], button")];
  const unnamed = controls.filter((e) => visible(e) && !named(e));
  const headings = document.querySelectorAll("h1, h2, h3, h4, h5, h6");
  return {
    lang: document.documentElement.lang,
    title: document.title,
    scheme: document.body.dataset.mdColorScheme,
    ids: [...document.querySelectorAll("[id], a[name]")].flatMap((e) => [e.id, e.name || e.id]),
    links: [...document.querySelectorAll("a[href]")].map((e) => e.href),
    unnamed: unnamed.map(tell),
    images: [...document.images].map((e) => ({ src: e.src, alt: e.alt, width: e.naturalWidth })),
    headings: [...headings].map((e) => ({ level: Number(e.tagName[1]), text: tell(e) })),
    faint: [...faint].map(([text, ratio]) => `${text}: ${ratio.toFixed(2)}`),
    outside: outside.map(tell),
    width: document.documentElement.scrollWidth,
    window: innerWidth,
  };
}
