// The excerpts of the search results are plain text: the marks around formulas go.
const plain = Search.htmlToText;
Search.htmlToText = (html, anchor) => plain(html.replace(/\\[()[\]]/g, ""), anchor);
